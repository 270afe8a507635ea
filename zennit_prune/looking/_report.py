'''``report``: one HTML page about a plan, to be read before anything is removed.'''
from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import PruneError, names_options, shown
from ..planning._cost import UNIT_NAMES
from ..planning._plan import Plan
from ..relevance._initial import Initial, check_initial
from ..relevance._outputs import Output, check_output
from ..relevance._relevance import Relevance, Reliability
from ..util._arguments import plain
from ..util._display import needed, some
from ..util._files import check_folder, refuse_path_first, write_text
from ..util._yielded import as_target
from . import _charts as charts
from . import _findings as findings
from ._charts import Chart, Markup, amount
from ._findings import Amount, Check, Costs, Curved, Group, Subject
from ._sections import (
    ClassSection,
    HeatmapSection,
    Images,
    RiskSection,
    class_section,
    heatmap_section,
    risk_section,
)

SECTIONS = {'summary': 'Summary', 'images': 'Images', 'plan': 'Plan', 'classes': 'Classes', 'risk': 'Channels at risk',
            'reliability': 'Reliability', 'budget': 'Budgets', 'groups': 'Groups', 'checks': 'Checks',
            'again': 'Reproduce', 'limits': 'Limits'}
MISSING = {
    'images': 'Give x= with a few images to see their heatmaps before and after pruning.',
    'relevance': 'Give relevance= with the scores that the plan was made from to see which scores are removed.',
    'classes': 'Give relevance= collected with exemplars=8, of samples with one class each, to see how much relevance '
               'each class loses.',
    'risk': 'Give relevance= collected with exemplars=8, and references= with the loader it was collected from, to '
            'see the channels to be removed that single samples depend on.',
    'reliability': 'Give relevance= collected from at least two reference samples to see whether other samples would '
                   'give the same ranking.',
    'budget': "Give sweep=zp.sweep(...) to see accuracy over budget; include the criterion 'random'.",
}
ORDER = 'report(pruner, plan, relevance, x, target, path)'
NARROW = 0.15  # fraction of a group's channels below which the group is reported as a possible bottleneck
UNRELIABLE = 0.8  # split-half rank correlation below which a ranking is reported as unreliable


@dataclass(frozen=True)
class Curves:
    '''The chart of a sweep, with its legend and its values as a table.'''

    chart: Chart
    legend: list[tuple[str, int]]
    what: str
    table: str


@dataclass(frozen=True)
class Page:
    '''The content of the page, as the template writes it.'''

    title: str
    lead: str
    first: list[tuple[str, str]]
    amounts: list[Amount]
    heatmaps: HeatmapSection | None
    costs: Costs
    others: str
    groups: list[Group]
    ranked: list[Group]
    locked: dict[str, list[str]]
    notes: list[str]
    classes: ClassSection | None
    risk: RiskSection | None
    reliability: str
    correlations: Chart | None
    sweep: Curves | None
    checks: list[Check]
    origin: dict[str, str]
    commands: list[str]
    plan_link: str
    sections: Mapping[str, str]
    missing: Mapping[str, str]


@names_options()
def report(pruner: Subject, plan: Plan, relevance: Relevance | None = None, x: Any = None, target: Any = None,
           path: str | os.PathLike[str] = 'report.html', *, initial: Initial = 'one-hot',
           output: Output = None, small: nn.Module | None = None, display: torch.Tensor | None = None,
           class_names: Sequence[str] | None = None, image_names: Sequence[str] | None = None,
           sweep: Curved | None = None,
           evaluation: Mapping[str, tuple[Any, Any]] | None = None, references: Any = None,
           commands: Sequence[str] | None = None, max_images: int = 16, title: str | None = None,
           progress: bool | None = None) -> None:
    '''Write one self-contained HTML page about a plan: which channels are to be removed, and what changes without them.

    The page needs no network connection and no other file, and nothing is removed to make it. A section whose data is
    not given says which argument to give. jinja2 is needed: ``pip install 'zennit-prune[report]'``.

    Parameters
    ----------
    pruner: Pruner
        The network and its rules.
    plan: Plan
        The channels to be removed.
    relevance: Relevance, optional
        The scores that the plan was made from; those of ``collect(..., exemplars=8)`` also show classes and channels at
        risk.
    x: torch.Tensor, optional
        Images to compute heatmaps of, shape (N, C, H, W), as they are fed to the network.
    target: torch.Tensor, optional
        Their class indices, shape (N,); by default, the classes that the network predicts.
    path: path-like
        The file to write. It appears when it is complete.
    initial: str or callable
        The relevance at the target, see :func:`zennit_prune.heatmap`; ``'value'`` for regressions.
    output: int, str or callable, optional
        The output that relevance starts from, where the network returns several tensors; see
        :func:`zennit_prune.heatmap`.
    small: torch.nn.Module, optional
        The pruned network, repaired or trained further; by default, the original with the channels masked.
    display: torch.Tensor, optional
        The images to show for ``x``, shape (N, 1 or 3, H, W), values from 0 to 1, or bytes. By default, each image of
        ``x`` is stretched to its own range.
    class_names, image_names: sequence of str, optional
        Names of classes by index, and of images in the order of ``x``.
    sweep: Sweep, optional
        Accuracy over budget, which is drawn as a chart.
    evaluation: mapping of str to tuple, optional
        Values measured before and after, e.g. ``{'accuracy on 5,000 test images': (0.935, 0.921)}``. Numbers are
        written with four digits, texts as they are, None as a dash.
    references: iterable or tensor, optional
        The samples that ``relevance`` was collected from, in the same order: a loader, a pair of tensors, or inputs
        alone. Channels at risk are shown on excerpts of them.
    commands: sequence of str, optional
        The commands that make the plan again, line by line.
    max_images: int
        The largest number of images to show; those that change most come first.
    title: str, optional
        The heading.
    progress: bool, optional
        Show a progress bar on standard error; as the pruner unless given.

    Raises
    ------
    PruneError
        If jinja2 is not installed, there is no folder for the file, or arguments do not fit each other: a plan of
        another trace, images and targets of different numbers, references in another order.

    See Also
    --------
    heatmap_image : Draws images and heatmaps as a PNG file.
    agreement : Compares heatmaps before and after, image by image.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                             torch.nn.Linear(144, 2))
    >>> x, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> pruner = zp.Pruner(model, None, x)
    >>> relevance = pruner.collect((x, labels), progress=False)
    >>> plan = pruner.plan(relevance, zp.Budget(channels=0.5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / 'report.html'
    ...     zp.report(pruner, plan, relevance, x, labels, path, progress=False)
    ...     'removes 2 of 4 removable channels' in path.read_text(encoding='utf-8')
    True
    '''
    refuse_path_first(ORDER, pruner, plan, relevance, x)
    _check_kinds(pruner, plan, relevance)
    jinja2 = needed('jinja2', 'report', 'report()')
    check_folder(path)
    images = _checked(pruner, plan, x, target, display, class_names, image_names, max_images, initial,
                      output)
    page = _page(pruner, plan, relevance, images, small, references, sweep, evaluation, commands or (), title,
                 pruner.progress if progress is None else progress)
    environment = jinja2.Environment(loader=jinja2.PackageLoader('zennit_prune.looking'), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    script = environment.loader.get_source(environment, 'report.js')[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template('report.html').render(page=page, script=Markup(script), some=some,
                                                          script_sum=Markup(f'sha256-{digest}'))
    write_text(path, text.lstrip())


def _page(pruner: Subject, plan: Plan, relevance: Relevance | None, images: Images, small: nn.Module | None,
          references: Any, sweep: Curved | None, evaluation: Mapping[str, tuple[Any, Any]] | None,
          commands: Sequence[str], title: str | None, progress: bool) -> Page:
    '''Compute all that the page shows.'''
    with tqdm(desc='report', total=5, disable=not progress, leave=False) as bar:
        amounts, costs = findings.amounts(plan, evaluation), findings.layer_costs(plan)
        reliability = relevance.reliability() if relevance is not None and relevance.has_halves else plan.reliability
        groups = findings.group_findings(plan, relevance, reliability)
        bar.update()
        heatmaps = heatmap_section(pruner, plan, small, images)
        bar.update()
        classes = class_section(plan, relevance, images)
        risk = risk_section(pruner, plan, relevance, references, images)
        bar.update()
        checks = findings.checks(pruner, plan, small, images.x, images.target, images.initial, images.output)
        bar.update()
        origin = findings.origin(pruner, plan, relevance, small)
        bar.update()
    ranked = sorted((group for group in groups if group.ranking is not None), key=lambda group: group.left / group.size)
    total, removed = sum(group.size for group in groups), sum(group.removed for group in groups)
    after = ('the pruned network that was given' if small is not None else
             'the original with these channels masked: nothing has been removed')
    lead = (f'{type(pruner.model).__name__}: the plan removes {removed:,} of {total:,} removable channels, in '
            f'{sum(group.removed > 0 for group in groups)} of {len(groups)} groups. "After" is {after}.')
    before, left = costs.others
    plan_text = base64.b64encode(findings.plan_text(plan).encode()).decode()
    return Page(
        title=title or f'Pruning plan for {type(pruner.model).__name__}', lead=lead,
        first=list(_first(groups, checks, heatmaps, classes, reliability)), amounts=amounts, heatmaps=heatmaps,
        costs=costs, others=f'{amount(before)} → {amount(left)}', groups=groups, ranked=ranked,
        locked=findings.locked_by_reason(plan.graph), notes=plan.graph.notes, classes=classes, risk=risk,
        reliability='' if reliability is None else f'{str(reliability)[:1].upper()}{str(reliability)[1:]}.',
        correlations=findings.reliability_chart(groups), sweep=None if sweep is None else _curves(sweep), checks=checks,
        origin=origin, commands=list(commands), plan_link=f'data:application/json;base64,{plan_text}',
        sections=SECTIONS, missing=MISSING)


def _first(groups: Sequence[Group], checks: Sequence[Check], heatmaps: HeatmapSection | None,
           classes: ClassSection | None, reliability: Reliability | None) -> Iterator[tuple[str, str]]:
    '''Return the findings to read first, each with the section that shows it.'''
    for check in checks:
        if check.good is False:
            yield f'A check failed: “{check.name}”.', 'checks'
    if heatmaps is not None:
        yield heatmaps.summary, 'images'
    narrow = [group.name for group in groups if group.left <= NARROW * group.size]
    if narrow:
        yield f'At most {NARROW:.0%} of the channels are left in {some(narrow, 3)}.', 'plan'
    if classes is not None:
        yield classes.summary, 'classes'
    if reliability is not None and reliability.network < UNRELIABLE:
        yield (f'The ranking depends on the choice of reference samples: its split-half rank correlation is '
               f'{reliability.network:.2f}.', 'reliability')


def _curves(sweep: Curved) -> Curves:
    '''Draw the chart of a sweep.'''
    curves = sweep.curves()
    plain = {repair for _, repair in curves} == {'none'}
    drawn = [charts.Line(criterion if plain else f'{criterion}, {repair}',
                         [(point.left, point.mean, point.spread) for point in points.values() if point.seeds])
             for (criterion, repair), points in curves.items()]
    if not any(line.points for line in drawn):
        raise PruneError('sweep has no value to draw: print it for the reasons.')
    chart, legend = charts.lines(drawn, sweep.original)
    unit = sweep.unit.removesuffix('_fraction')
    return Curves(chart, legend, f'{sweep.evaluated} over {UNIT_NAMES.get(unit, unit)} left', str(sweep))


def _check_kinds(pruner: object, plan: object, relevance: object) -> None:
    '''Refuse objects that stand in the place of others.'''
    for name, value, fits in (('pruner', pruner, hasattr(pruner, 'preflight')), ('plan', plan, isinstance(plan, Plan)),
                              ('relevance', relevance, relevance is None or isinstance(relevance, Relevance))):
        if not fits:
            raise PruneError(f'{shown(value)} stands in the place of {name}: the order of arguments is {ORDER}.')


def _checked(pruner: Subject, plan: Plan, x: Any, target: Any, display: Any, class_names: Any, image_names: Any,
             max_images: Any, initial: Initial, output: Output) -> Images:
    '''Return the images of the report, after a check that the arguments fit each other.'''
    if plan.graph is not pruner.graph and plan.graph.groups != pruner.graph.groups:
        raise PruneError('the plan was made from another trace than the pruner: read it with '
                         'Plan.load(path, pruner.graph).')
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
        raise PruneError(f'max_images={max_images!r}: show at least one.')
    x, target = plain(x), as_target(target)
    if x is not None and (not isinstance(x, torch.Tensor) or x.dim() != 4 or not len(x)):
        what = f'shape {tuple(x.shape)}' if isinstance(x, torch.Tensor) else f'a {type(x).__name__}'
        raise PruneError(f'x is {what}: give images, a tensor of shape (N, C, H, W).')
    check_initial(initial)
    check_output(output)
    if x is None and any(value is not None for value in (target, display, image_names)):
        raise PruneError('target=, display= and image_names= describe images: give x= with them.')
    for name, value in (('target', target), ('display', display), ('image_names', image_names)):
        if x is not None and value is not None and not isinstance(value, str) and len(value) != len(x):
            raise PruneError(f'{name} has {len(value)} entries for {len(x)} images: give one for each.')
    return Images(x, target, display, list(class_names or ()), list(image_names or ()), max_images, initial, output)
