'''Labels, channels, positions and indices are told apart by mypy.'''
from pathlib import Path

import pytest

api = pytest.importorskip('mypy.api')

ROOT = Path(__file__).parents[2]
SNIPPET = '''
from zennit_prune.graph._groups import ChannelGroup, Member
from zennit_prune.graph._solve import Solution
from zennit_prune.tracing._labels import Channels, Field, Labels, Positions
from zennit_prune.util._networks import Indices


def fine(solution: Solution, group: ChannelGroup, member: Member, field: Field) -> None:
    labels: Labels = field.labels
    channels: Channels = group.channels
    positions: Positions = group.order_by_block([0.0])
    index: Indices = member.index
    Field.along(labels, 0, 2)


def mixed(solution: Solution, group: ChannelGroup, member: Member, field: Field) -> None:
    Field.along(group.order_by_block([0.0]), 0, 2)
    Field.along(solution.channel, 0, 2)
    channels: Channels = field.labels
    positions: Positions = member.index
    index: Indices = group.channels
'''


def test_kinds_of_numbers_cannot_be_mixed_up(tmp_path: Path) -> None:
    file = tmp_path / 'snippet.py'
    file.write_text(SNIPPET)
    said, _, _ = api.run(['--config-file', str(ROOT / 'pyproject.toml'), '--no-error-summary', str(file)])
    first = SNIPPET.splitlines().index('def mixed(solution: Solution, group: ChannelGroup, member: Member, field: '
                                       'Field) -> None:') + 2
    wrong = [line for line in said.splitlines() if 'snippet.py' in line and 'error:' in line]
    assert [line.split(':')[1] for line in wrong] == [str(first + number) for number in range(5)], said
    kinds = [('Positions', 'Labels'), ('Channels', 'Labels'), ('Labels', 'Channels'), ('Indices', 'Positions'),
             ('Channels', 'Indices')]
    for line, (given, wanted) in zip(wrong, kinds):
        assert f'type "{given}"' in line and f'"{wanted}"' in line
