'''The commands of ``zennit-prune`` with their options and their help; ``_cli.py`` imports them when they are used.'''
from __future__ import annotations

import contextlib
import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import PruneError
from ..planning._cost import BUDGETS, Budget
from ..relevance._criteria import CRITERIA
from ..repairs._repair import METHODS
from . import _demo
from ._commands import Outcome, execute, foresee
from ._jobs import NAMES as COMPOSITES
from ._jobs import PER_CLASS, WITHOUT_CLASSES, Job, Options
from ._sources import Source

SOURCES = '''MODEL is torchvision:NAME, timm:NAME or FILE.py:FUNCTION, a function that returns the network; the code in
    FILE.py is executed. Nothing is ever downloaded: weights come from --weights, or from the function.

    IMAGES is a folder with a sub-folder of images for every class, or with images alone. References are drawn from it;
    the rest serves to measure on.

    Progress goes to standard error, results to standard output. Exit status: 0 done, 1 it cannot be done, 2 a mistake
    in the command.'''

EXAMPLES = {
    'inspect': (
        'torchvision:resnet18 photos --weights resnet18.pth --classes names --flops 0.7',
        'nets.py:my_net photos --size 32 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --params 0.5',
        'timm:resnet50 photos --weights net.safetensors --outputs 17 --flops 0.5 --dry-run',
    ),
    'run': (
        'torchvision:resnet18 photos --weights resnet18.pth --outputs 17 --flops 0.7',
        'nets.py:my_net photos --size 32 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --plan pruned/plan.json',
        'timm:resnet50 photos --weights net.safetensors --flops 0.5 --json > result.json',
    ),
}


class Terminated(BaseException):
    '''Raised when the process is asked to end.'''


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    '''Read numbers with commas between.'''
    try:
        return None if value is None else tuple(float(part) for part in value.split(','))
    except ValueError:
        raise click.BadParameter(f'{value!r} is not a number, or three with commas between.') from None


def amount(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    '''Read a whole number, or a real one where there is a point.'''
    try:
        return None if value is None else int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise click.BadParameter(f'{value!r} is not a number.') from None


def source(ctx: click.Context, param: click.Parameter, value: str) -> Source:
    '''Read ``torchvision:NAME``, ``timm:NAME`` or ``FILE.py:FUNCTION``.'''
    try:
        return Source.parse(value)
    except PruneError as error:
        raise click.BadParameter(str(error)) from error


FOLDER, FILE = click.Path(path_type=Path, file_okay=False), click.Path(path_type=Path, dir_okay=False)
COUNT = click.IntRange(min=1)
AMOUNTS = {
    'flops': 'The FLOPs that are to be left: a share, as 0.5, or a number above 1. Exactly one budget is needed.',
    'params': 'Or the parameters that are to be left, as a share or a number.',
    'bytes': 'Or the bytes that are to be left, as a share or a number.',
    'channels': 'Or the removable channels that are to be left, as a share or a number.',
    'latency': 'Or the seconds that one image may take on this device.',
    'latency_fraction': 'Or the share of the time that is to be left.',
}
SHARED = [
    click.argument('model', callback=source),
    click.argument('images', type=click.Path(path_type=Path)),
    click.option('--weights', type=FILE, help='The weights: .safetensors, or of torch.save(network.state_dict(), ...); '
                 'read without executing code.'),
    click.option('--outputs', type=COUNT, help='Number of outputs of a torchvision or timm network, where it was '
                 'trained with other classes than the public weights.'),
    click.option('--classes', default='auto', show_default=True, metavar='WAY|FILE', help='Which output belongs to '
                 "which sub-folder. sorted: in the order of names, as in training with torchvision's ImageFolder; "
                 'auto: as sorted, if there are as many folders as outputs; numbers: names begin with the number of '
                 "the output, from 0; names: they are those of torchvision's classes; none: labels are not used, the "
                 'prediction is explained. Or a file: names of all outputs, line by line, or JSON {"folder": output}.'),
    click.option('--size', type=COUNT, metavar='PIXELS', help='Side of the square that the network sees. Default of '
                 "this and the next three: as torchvision or timm prepare images for the network's public weights."),
    click.option('--resize', type=COUNT, metavar='PIXELS', help='Scale the shorter side to this before the middle is '
                 'cut out.'),
    click.option('--mean', callback=numbers, metavar='NUMBERS', help='For values in 0 to 1: 0.485,0.456,0.406, or one '
                 'number for grey images.'),
    click.option('--std', callback=numbers, metavar='NUMBERS', help='Likewise. For a network that takes 0 to 255: '
                 '--mean 0,0,0 --std 0.0039215686,0.0039215686,0.0039215686.'),
    click.option('--per-class', type=COUNT, help=f'References of every class.  [default: {PER_CLASS}]'),
    click.option('--references', type=COUNT, help='References from a folder without classes.  '
                 f'[default: {WITHOUT_CLASSES}]'),
    click.option('--held-out', type=click.IntRange(min=0), default=1000, show_default=True,
                 help='Measure on at most so many images that are no references.'),
    *[click.option(f'--{name.replace("_", "-")}', callback=amount, metavar='NUMBER', help=text)
      for name, text in AMOUNTS.items()],
    click.option('--composite', type=click.Choice(COMPOSITES), default='recommended', show_default=True,
                 help="The rules of relevance, by Zennit's names; recommended: epsilon everywhere."),
    click.option('--criterion', type=click.Choice(list(CRITERIA)), default='relevance',
                 show_default=True, help='How channels are scored.'),
    click.option('--ignore', multiple=True, metavar='PATTERN', help="Keep the output channels of modules, e.g. "
                 "'layer4*'; repeatable."),
    click.option('--round-to', type=COUNT, help='Leave multiples of this many channels, e.g. 8.'),
    click.option('--seed', type=int, default=0, show_default=True, help='For the choice of references.'),
    click.option('--device', default='cpu', show_default=True, help='Or cuda, cuda:1, ...'),
    click.option('--batch', type=COUNT, default=32, show_default=True, help='Images that are computed at once.'),
    click.option('--report/--no-report', default=True, help='Write report.html, which needs jinja2.'),
    click.option('--out', type=FOLDER, default=Path('pruned'), show_default=True, help='Where the files go, all at '
                 'once at the end.'),
    click.option('--force', is_flag=True, help='Replace files in that folder.'),
    click.option('--dry-run', is_flag=True, help='Check everything and say what would be done; write nothing.'),
    click.option('--json', 'as_json', is_flag=True, help='Print the result as JSON.'),
]  # fmt: skip


def shared(command: Callable[..., None]) -> Callable[..., None]:
    '''Give a command the arguments and options that all commands share, and the part of its help that explains them.'''
    for option in reversed(SHARED):
        command = option(command)
    command.__doc__ = (command.__doc__ or '').replace('SOURCES', SOURCES)
    return command


def examples(command: str) -> str:
    '''Return the examples at the end of a help text.'''
    return '\n'.join(['\b', 'Examples:', *(f'  zennit-prune {command} {line}' for line in EXAMPLES[command])])


@click.command('demo')
@click.option('--out', type=click.Path(path_type=Path, file_okay=False), default=Path('demo'), show_default=True,
              help='Where the files go.')
def demo(out: Path) -> None:
    '''Train a small network on scanned digits, explain it, look at heatmaps, and prune it to half of its FLOPs.'''
    with clean_errors():
        _demo.run(out)


def inspect_command(**options: Any) -> None:
    '''Explain MODEL on IMAGES and plan what to prune, without removing anything.

    Writes plan.json, relevance.safetensors, heatmaps.png and report.html, which shows what would go and what the
    network would see without it.

    SOURCES
    '''
    _carry_out(cut=False, **options)


def run_command(**options: Any) -> None:
    '''Prune MODEL by what IMAGES show, and repair it.

    Writes what `inspect` does, and small.safetensors, the pruned network; zennit_prune.load reads it. A plan that
    `inspect` wrote, edited or not, is carried out by --plan.

    SOURCES
    '''
    _carry_out(cut=True, **options)


inspect = click.command('inspect', epilog=examples('inspect'))(shared(inspect_command))
run = click.command('run', epilog=examples('run'))(
    click.option('--plan', type=FILE, help='Carry out this plan, in place of a budget.')(
        click.option('--repair', type=click.Choice(METHODS), default='refit', show_default=True, help='How weights '
                     'make up for removed channels, by the references without their labels.')(shared(run_command))))


def _carry_out(cut: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    budgets = {name: options.pop(name) for name in BUDGETS}
    budget = _budget({name: value for name, value in budgets.items() if value is not None}, options.get('plan'))
    if options.get('plan') is not None and options['round_to'] is not None:
        raise click.UsageError('--round-to is for planning by a budget: the plan that is given says what goes.')
    command = click.get_current_context().obj or ''
    met: list[str] = []
    with clean_errors(), terminable(), contextlib.redirect_stdout(sys.stderr), told_warnings(met):
        job = Job(Options(budget=budget, command=command, progress=sys.stderr.isatty(), **options), _tell(met))
        outcome = foresee(job, cut) if dry_run else execute(job, cut)
    click.echo(_as_json(outcome, met) if as_json else outcome.text)


def _budget(given: dict[str, float], plan: Path | None) -> Budget | None:
    options = [f'--{name.replace("_", "-")}' for name in BUDGETS]
    if len(given) + (plan is not None) != 1:
        used = [f'--{name.replace("_", "-")}' for name in given] + ['--plan'] * (plan is not None)
        raise click.UsageError(f'give exactly one budget, {", ".join(options)}, or a plan by "run --plan" (given: '
                               f'{", ".join(used) or "none"}).')
    try:
        return Budget(**given) if given else None
    except PruneError as error:
        raise click.UsageError(str(error)) from error


def _as_json(outcome: Outcome, met: Sequence[str]) -> str:
    return json.dumps({'version': __version__, **outcome.facts, 'warnings': list(met)}, indent=1)


def _tell(met: list[str]) -> Callable[[str], None]:
    '''A function that shows lines on standard error and keeps warnings.'''
    def tell(line: str) -> None:
        if line.startswith('Warning: '):
            met.append(line.removeprefix('Warning: '))
        click.echo(line, err=True)

    return tell


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    '''Show errors as one line in place of a traceback.'''
    try:
        yield
    except (PruneError, OSError) as error:
        raise click.ClickException(' '.join(str(error).split())) from error


@contextlib.contextmanager
def told_warnings(met: list[str]) -> Iterator[None]:
    '''Show each warning as one line.'''
    tell = _tell(met)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tell(f'Warning: {" ".join(str(message).split())}')
        yield


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    '''Tidy up when asked to end by SIGTERM.'''
    def end(*_: Any) -> None:
        raise Terminated

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, former)
