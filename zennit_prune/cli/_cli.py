'''The entrance of the command line: help, and a mistyped command, are answered without importing torch.'''
from __future__ import annotations

import shlex
from importlib import import_module

import click

from .. import __version__
from ..errors import nearest

COMMANDS = {
    'demo': 'Train a small network on scanned digits, explain it, look at heatmaps, and prune it to half of its FLOPs.',
    'inspect': 'Explain MODEL on IMAGES and plan what to prune, without removing anything.',
    'run': 'Prune MODEL by what IMAGES show, and repair it.',
}


class Group(click.Group):
    '''A group of commands that are imported when they are used; it keeps the command line as it was typed.'''

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        '''Keep the command line as ``ctx.obj``, for the report, then parse it as any group does.'''
        ctx.obj = shlex.join(['zennit-prune', *args])
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        '''The names of all commands.'''
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        '''Import a command.'''
        return getattr(import_module('._options', __package__), cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]
                        ) -> tuple[str | None, click.Command | None, list[str]]:
        '''Find the command that was typed; of one that does not exist, say which is near.'''
        if args[0] not in COMMANDS and not args[0].startswith('-'):
            known = ', '.join(COMMANDS)
            ctx.fail(f'No such command {args[0]!r}: use one of {known}{nearest(args[0], COMMANDS) or "."}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        '''List the commands with a line each.'''
        with formatter.section('Commands'):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Group)
@click.version_option(__version__)
def main() -> None:
    '''Prune networks by explaining them.'''
