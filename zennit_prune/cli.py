'''The command line: ``zennit-prune``.'''
from __future__ import annotations

from pathlib import Path

import click

from . import __version__, demo
from .errors import PruneError


@click.group()
@click.version_option(__version__)
def main() -> None:
    '''Prune networks by explaining them.'''


@main.command('demo')
@click.option('--out', type=click.Path(path_type=Path, file_okay=False), default=Path('demo'), show_default=True,
              help='Where the files go.')
def demo_command(out: Path) -> None:
    '''Train a small network on scanned digits, explain it, look at heatmaps, and prune it to half of its FLOPs.'''
    try:
        demo.run(out)
    except PruneError as error:
        raise click.ClickException(str(error)) from error
