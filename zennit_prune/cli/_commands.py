'''The work of ``zennit-prune inspect`` and ``zennit-prune run``, step by step.'''
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import PruneError
from ..looking._heatmap import heatmap
from ..looking._pictures import heatmap_image
from ..looking._report import report
from ..pipeline._step import costs_left
from ..planning._cost import Budget
from ..planning._plan import Plan
from ..planning._storage import save
from ..relevance._initial import Origin
from ..relevance._relevance import Relevance
from ..repairs._references import References
from ..repairs._repair import repair
from ..util._display import needed, table
from ..util._files import all_at_once, check_absent
from ._jobs import Job

SHOWN = 8  # columns of the picture
REPORTED = 32  # images that the report chooses from
EXEMPLARS = 8
DOUBTED = 0.5  # a warning if more folders than this are mostly predicted as something else
LABELS = {'params': 'parameters', 'flops': 'FLOPs per image', 'bytes': 'bytes', 'channels': 'removable channels'}


class Score(NamedTuple):
    '''The predictions of a network for images.

    Attributes
    ----------
    predicted: torch.Tensor
        Its classes, shape (N,).
    accuracy: float or None
        The share that is right; None without labels or images.
    '''

    predicted: torch.Tensor
    accuracy: float | None

    def same(self, other: Score) -> float | None:
        '''Return the share of images for which another network predicts the same class.'''
        return float((self.predicted == other.predicted).float().mean()) if len(self.predicted) else None


class Outcome(NamedTuple):
    '''The facts of a run as JSON values, and a text for people.'''

    facts: dict[str, Any]
    text: str


def files_of(job: Job, cut: bool) -> list[str]:
    '''Return the files that a command writes.'''
    return ['plan.json', 'relevance.safetensors', 'heatmaps.png', *['report.html'] * job.options.report,
            *['small.safetensors'] * cut]


def _check(job: Job, cut: bool) -> list[str]:
    '''Return the files to write, after a check of whatever would keep them from being written in the end.'''
    names = files_of(job, cut)
    if job.options.report:
        needed('jinja2', 'report', 'report.html')
    if not job.options.force:
        check_absent(job.options.out, names)
    return names


def foresee(job: Job, cut: bool) -> Outcome:
    '''Say what would be done; nothing is computed or written.'''
    options, files = job.options, [str(job.options.out / name) for name in _check(job, cut)]
    aim = f'the plan {options.plan}' if options.plan else repr(options.budget)
    lines = [f'would collect {options.criterion} from {len(job.drawn)} references',
             f'would plan by {aim}' if options.budget else f'would take {aim}',
             *[f'would prune, repair ({options.repair}) and verify'] * cut,
             f'would measure on {len(job.rest)} images', *[f'would write {name}' for name in files]]
    return Outcome({**job.facts, 'dry_run': True, 'files': files}, '\n'.join(lines))


def execute(job: Job, cut: bool) -> Outcome:
    '''Explain a network, plan, and write the plan with its pictures; with ``cut``, also prune, repair and save.

    Raises
    ------
    PruneError
        For whatever keeps the result from being exact or the files from being written; none of them is then.
    '''
    began, options, names = time.perf_counter(), job.options, _check(job, cut)
    _doubt(job, _score(job, job.network, job.drawn))
    references = References(job.images(job.drawn).loader(options.batch), seed=options.seed)
    relevance = _collect(job, references)
    plan = job.given_plan or _planned(job, relevance, options.budget)
    networks: dict[str, nn.Module] = {'before': job.network}
    if cut:
        job.say('pruning')
        networks['pruned'] = plan.apply(job.network)
        if options.repair != 'none':
            networks['repaired'] = _repaired(job, networks['pruned'], plan, references)
    else:
        networks['as it would be'] = plan.masked(job.network)
    if job.rest:
        job.say(f'measuring on {len(job.rest)} images')
    scores = {name: _score(job, network, job.rest) for name, network in networks.items()}
    last = list(networks)[-1]
    with all_at_once(options.out, names, options.force) as folder:
        plan.save(folder / 'plan.json')
        relevance.save(folder / 'relevance.safetensors')
        _draw(job, folder / 'heatmaps.png', networks[last], last)
        if options.report:
            job.say('writing the report')
            _write_report(job, folder / 'report.html', plan, relevance, networks[last] if cut else None,
                          _measured(job, scores, last))
        if cut:
            save(networks[last], plan, folder / 'small.safetensors')
    files = [str(options.out / name) for name in names]
    facts = {**job.facts, 'command': 'run' if cut else 'inspect', 'repair': options.repair if cut else None,
             **{when: {unit: round(cost) for unit, cost in costs_left(which).items()}
                for when, which in (('before', Plan(plan.graph)), ('after', plan))},
             'removed': {name: list(positions) for name, positions in plan.removed.items()},
             'accuracy': {name: score.accuracy for name, score in scores.items()},
             'same_prediction': {name: score.same(scores['before']) for name, score in scores.items()},
             'reliability': relevance.reliability().network if relevance.has_halves else None,
             'files': files, 'seconds': round(time.perf_counter() - began, 3)}
    return Outcome(facts, '\n\n'.join([*[str(plan)] * (not cut), _summary(job, plan, scores),
                                       '\n'.join(f'wrote {name}' for name in files)]))


def _score(job: Job, network: nn.Module, chosen: Sequence[int]) -> Score:
    predicted = [torch.zeros(0, dtype=torch.long, device='cpu')]
    with torch.no_grad():
        for batch in job.images(chosen, labelled=False).loader(job.options.batch):
            predicted.append(_predicted(network, batch.to(job.device)).cpu())
    found, truth = torch.cat(predicted), job.images(chosen).targets
    right = found == torch.tensor(truth, device='cpu') if truth else None
    return Score(found, None if right is None else float(right.float().mean()))


def _predicted(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    '''Return the class that a network predicts for each image.'''
    origin = Origin('predicted')
    return origin.predicted(origin.chosen(network(inputs)))


def _doubt(job: Job, score: Score) -> None:
    '''Warn if the network predicts something else than the folder says for most images of most folders.'''
    labels = torch.tensor([job.found.labels[number] for number in job.drawn], device='cpu')
    mapping = job.mapping or {}
    usual = {name: int(score.predicted[labels == number].mode().values) for number, name in enumerate(mapping)}
    wrong = [name for name, output in mapping.items() if usual[name] != output]
    if len(wrong) > DOUBTED * len(mapping):
        name = wrong[0]
        job.say(f'Warning: for {len(wrong)} of {len(mapping)} folders, the network mostly predicts something else, '
                f'e.g. output {usual[name]} for {name!r}, which is said to be output {mapping[name]}. Are --classes, '
                '--weights, --mean and --std right?')


def _collect(job: Job, references: References) -> Relevance:
    options = job.options
    job.say(f'collecting {options.criterion} from {len(job.drawn)} references')
    more: dict[str, Any] = {} if job.mapping is not None else {'target': 'predicted'}
    if options.criterion == 'relevance':
        more['exemplars'] = EXEMPLARS
    return job.pruner.collect(references, options.criterion, seed=options.seed, **more)


def _planned(job: Job, relevance: Relevance, budget: Budget | None) -> Plan:
    assert budget is not None
    job.say(f'planning by {budget!r}')
    plan = job.pruner.plan(relevance, budget, round_to=job.options.round_to)
    if not plan.removed:
        raise PruneError(f'{budget!r} leaves the whole network: ask for less.')
    return plan


def _repaired(job: Job, small: nn.Module, plan: Plan, references: References) -> nn.Module:
    job.say(f'repairing: {job.options.repair}')
    return repair(job.network, small, plan, references.inputs(job.device), job.options.repair, job.options.progress)


def _shown(job: Job, count: int) -> tuple[torch.Tensor, Any, list[str]]:
    '''Return inputs, targets and names of images to show, which are no references where there are others.'''
    images = job.images((job.rest or job.drawn)[:count])
    inputs = [images[number] if images.targets is None else images[number][0] for number in range(len(images))]
    target = 'predicted' if images.targets is None else torch.tensor(images.targets, device=job.device)
    names = [Path(name).relative_to(job.options.images).as_posix() for name in images.files]
    return torch.stack(inputs).to(job.device), target, names


def _draw(job: Job, path: Path, network: nn.Module, name: str) -> None:
    inputs, target, names = _shown(job, SHOWN)
    if isinstance(target, str):  # of the original: both rows explain the same output
        with torch.no_grad():
            target = _predicted(job.network, inputs)
    rows = {'before': job.pruner.heatmap(inputs, target), name: heatmap(network, job.pruner.composite, inputs, target)}
    captions = [(Path(name).parent.name or Path(name).name)[-20:] for name in names]
    heatmap_image(job.prepare.shown(inputs), rows, path, captions)


def _measured(job: Job, scores: Mapping[str, Score], last: str) -> dict[str, tuple[Any, Any]]:
    '''Return the measurements before and after pruning, for the report.'''
    before, after = scores['before'], scores[last]
    where = f'{len(job.rest)} images that are no references'
    found = {} if before.accuracy is None else {f'accuracy on {where}': (before.accuracy, after.accuracy)}
    return {**found, f'predicted as before, of {where}': (1.0, after.same(before))} if job.rest else found


def _write_report(job: Job, path: Path, plan: Plan, relevance: Relevance, small: nn.Module | None,
                  evaluation: Mapping[str, tuple[Any, Any]]) -> None:
    inputs, target, names = _shown(job, REPORTED)
    report(job.pruner, plan, relevance, inputs, target, path, small=small, display=job.prepare.shown(inputs),
           class_names=job.class_names, image_names=names, evaluation=evaluation,
           references=job.images(job.drawn).loader(job.options.batch),
           commands=[job.options.command] if job.options.command else None, progress=job.options.progress)


def _summary(job: Job, plan: Plan, scores: Mapping[str, Score]) -> str:
    whole, left = costs_left(Plan(plan.graph)), costs_left(plan)
    rows: list[tuple[str, ...]] = [
        (LABELS[unit], f'{whole[unit]:,.0f}', f'{left[unit]:,.0f}', f'{left[unit] / (whole[unit] or 1):.0%}')
        for unit in LABELS]
    before = scores['before']
    if before.accuracy is not None:
        rows += [(f'accuracy, {name}', f'{before.accuracy:.1%}', f'{score.accuracy:.1%}', '')
                 for name, score in scores.items() if name != 'before']
    if job.rest:
        rows += [(f'predicted as before, {name}', '', f'{score.same(before):.1%}', '')
                 for name, score in scores.items() if name != 'before']
    note = f'\n\nMeasured on {len(job.rest)} images of the folder that are no references.' if job.rest else ''
    return table(('', 'before', 'after', 'left'), rows) + note
