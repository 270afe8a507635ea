'''``report``: one page that shows what a plan is about to destroy, before anything is cut.'''
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

from ..errors import PruneError
from ..planning._cost import UNIT_NAMES
from ..planning._plan import Plan
from ..relevance._relevance import Relevance, Reliability
from ..util._display import some
from ..util._files import check_folder, write_text
from ..util._plots import needed
from . import _charts as charts
from . import _findings as findings
from ._charts import Chart, Markup, amount
from ._findings import Amount, Check, Costs, Group
from ._sections import ClassLosses, Images, Looks, Risky, class_losses_of, look_at, risky_channels
from ._subject import Curved, Subject

SECTIONS = {'summary': 'Summary', 'images': 'Images', 'plan': 'Plan', 'classes': 'Classes', 'risky': 'Channels',
            'stability': 'Stability', 'budget': 'Budgets', 'groups': 'Groups', 'checks': 'Checks',
            'again': 'Reproduce', 'limits': 'Limits'}
MISSING = {
    'images': 'Give x= with a few images to see heatmaps of the network as it is and as it would be.',
    'relevance': 'Give relevance= with the scores the plan was made from to see where the cut falls.',
    'classes': 'Give relevance= collected with exemplars=8 to see what each class loses.',
    'risky': 'Give relevance= collected with exemplars=8, and references= with the loader it was collected from, to '
             'see what excites the channels that go.',
    'stability': 'Give relevance= collected from at least two references to see whether others would rank alike.',
    'budget': "Give sweep=zp.sweep(...) to see accuracy over budget; include the criterion 'random'.",
}
SLIVER = 0.15  # of a group's channels: less may be a bottleneck
SHAKY = 0.8  # rank correlation between halves below which a ranking is called unstable


@dataclass(frozen=True)
class Curves:
    '''A sweep, drawn.'''

    chart: Chart
    legend: list[tuple[str, int]]
    what: str
    table: str


@dataclass(frozen=True)
class Page:
    '''All that the template writes.'''

    title: str
    lead: str
    first: list[tuple[str, str]]
    amounts: list[Amount]
    looks: Looks | None
    costs: Costs
    others: str
    groups: list[Group]
    ranked: list[Group]
    locked: dict[str, list[str]]
    notes: list[str]
    classes: ClassLosses | None
    risky: Risky | None
    reliability: str
    stability: Chart | None
    sweep: Curves | None
    checks: list[Check]
    origin: dict[str, str]
    commands: list[str]
    plan_link: str
    sections: Mapping[str, str]
    missing: Mapping[str, str]


def report(path: str | os.PathLike[str], pruner: Subject, plan: Plan, relevance: Relevance | None = None, x: Any = None,
           target: Any = None, *, small: nn.Module | None = None, display: torch.Tensor | None = None,
           class_names: Sequence[str] | None = None, image_names: Sequence[str] | None = None,
           sweep: Curved | None = None, evaluation: Mapping[str, tuple[Any, Any]] | None = None,
           references: Any = None, commands: Sequence[str] | None = None, max_images: int = 16,
           title: str | None = None, progress: bool = True) -> None:
    '''Write one self-contained HTML page about a plan: what goes, why, and what the network sees without it.

    It needs no network connection, and nothing is removed to make it. What is not given is left out, and the page says
    what to give to see it.

    Parameters
    ----------
    path: path-like
        The page. It appears when it is complete.
    pruner: Pruner
        The network and its rules.
    plan: Plan
        What is to go.
    relevance: Relevance, optional
        The scores the plan was made from; with ``collect(..., exemplars=8)`` also the images that excite a channel.
    x: torch.Tensor, optional
        Images to look at, shape (N, C, H, W), as they are fed to the network.
    target: torch.Tensor, optional
        Their classes, shape (N,); by default, what the network predicts.
    small: torch.nn.Module, optional
        The pruned network, repaired or trained on; by default, the dry run of the plan.
    display: torch.Tensor, optional
        The images to show for ``x``, shape (N, 1 or 3, H, W), in 0..1 or as bytes. By default, each of ``x`` is
        stretched to its own range.
    class_names, image_names: sequence of str, optional
        What classes (by index) and images (in the order of ``x``) are called.
    sweep: Sweep, optional
        Accuracy over budget, to be drawn.
    evaluation: mapping of str to tuple, optional
        What was measured elsewhere, before and after: ``{'accuracy on 5,000 test images': (0.935, 0.921)}``.
        Numbers are written with four digits, texts as they are.
    references: iterable or tensor, optional
        What ``relevance`` was collected from, in the same order: a loader, a pair of tensors, or inputs alone. For the
        crops that excite a channel.
    commands: sequence of str, optional
        How to make this again, line by line.
    max_images: int
        At most so many images are shown, those first that change most.
    title: str, optional
        The heading.
    progress: bool
        Show a progress bar on standard error.

    Raises
    ------
    PruneError
        If jinja2 is not installed, or something given does not fit.
    '''
    jinja2 = needed('jinja2', 'report', 'report()')
    check_folder(path)
    images = _checked(pruner, plan, x, target, display, class_names, image_names, max_images)
    page = _page(pruner, plan, relevance, images, small, references, sweep, evaluation, commands or (), title, progress)
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
    with tqdm(desc='report', total=5, disable=not progress, leave=False) as bar:
        amounts, costs = findings.amounts(plan, evaluation), findings.layer_costs(plan)
        reliability = relevance.reliability() if relevance is not None and relevance.has_halves else plan.reliability
        groups = findings.group_findings(plan, relevance, reliability)
        bar.update()
        looks = look_at(pruner, plan, small, images)
        bar.update()
        classes = class_losses_of(plan, relevance, images)
        risky = risky_channels(pruner, plan, relevance, references, images.class_name)
        bar.update()
        checks = findings.checks(pruner, plan, small, images.x, images.target)
        bar.update()
        origin = findings.origin(pruner, plan, relevance, small)
        bar.update()
    ranked = sorted((group for group in groups if group.ranking is not None), key=lambda group: group.left / group.size)
    total, gone = sum(group.size for group in groups), sum(group.gone for group in groups)
    after = 'the pruned network that was given' if small is not None else 'a dry run: nothing has been removed'
    lead = (f'{type(pruner.model).__name__}: the plan removes {gone:,} of {total:,} removable channels, in '
            f'{sum(group.gone > 0 for group in groups)} of {len(groups)} groups. "After" is {after}.')
    before, left = costs.others
    plan_text = base64.b64encode(findings.plan_text(plan).encode()).decode()
    return Page(
        title=title or f'What pruning takes from {type(pruner.model).__name__}', lead=lead,
        first=list(_first(groups, checks, looks, classes, reliability)), amounts=amounts, looks=looks, costs=costs,
        others=f'{amount(before)} → {amount(left)}', groups=groups, ranked=ranked,
        locked=findings.locked_by_reason(plan.graph), notes=plan.graph.notes, classes=classes, risky=risky,
        reliability='' if reliability is None else f'{str(reliability)[:1].upper()}{str(reliability)[1:]}.',
        stability=findings.stability_chart(groups), sweep=None if sweep is None else _curves(sweep), checks=checks,
        origin=origin, commands=list(commands), plan_link=f'data:application/json;base64,{plan_text}',
        sections=SECTIONS, missing=MISSING)


def _first(groups: Sequence[Group], checks: Sequence[Check], looks: Looks | None, classes: ClassLosses | None,
           reliability: Reliability | None) -> Iterator[tuple[str, str]]:
    '''What deserves a look before all else, and the section that shows it.'''
    for check in checks:
        if check.good is False:
            yield f'“{check.name}” fails.', 'checks'
    if looks is not None:
        yield looks.summary, 'images'
    slivers = [group.name for group in groups if group.left <= SLIVER * group.size]
    if slivers:
        yield f'At most {SLIVER:.0%} of the channels are left in {some(slivers, 3)}.', 'plan'
    if classes is not None:
        yield classes.summary, 'classes'
    if reliability is not None and reliability.network < SHAKY:
        yield f'Other references would rank otherwise: two halves agree by {reliability.network:.2f} only.', 'stability'


def _curves(sweep: Curved) -> Curves:
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


def _checked(pruner: Subject, plan: Plan, x: Any, target: Any, display: Any, class_names: Any, image_names: Any,
             max_images: Any) -> Images:
    if plan.graph is not pruner.graph and plan.graph.groups != pruner.graph.groups:
        raise PruneError('the plan was made from another trace than the pruner: read it with '
                         'Plan.load(path, pruner.graph).')
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
        raise PruneError(f'max_images={max_images!r}: show at least one.')
    if x is not None and (not isinstance(x, torch.Tensor) or x.dim() != 4 or not len(x)):
        what = f'shape {tuple(x.shape)}' if isinstance(x, torch.Tensor) else f'a {type(x).__name__}'
        raise PruneError(f'x is {what}: give images, a tensor of shape (N, C, H, W).')
    if x is None and any(value is not None for value in (target, display, image_names)):
        raise PruneError('target=, display= and image_names= are of the images: give x= with them.')
    for name, value in (('target', target), ('display', display), ('image_names', image_names)):
        if x is not None and value is not None and not isinstance(value, str) and len(value) != len(x):
            raise PruneError(f'{name} has {len(value)} entries for {len(x)} images: give one for each.')
    return Images(x, target, display, list(class_names or ()), list(image_names or ()), max_images)
