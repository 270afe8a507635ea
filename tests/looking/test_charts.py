'''Charts: what is drawn is what was given.'''
from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from zennit_prune.looking import _charts as charts
from zennit_prune.looking._charts import Chart, Line


def paths(chart: Chart, name: str) -> list[str]:
    '''The outlines drawn in a class.'''
    root = ElementTree.fromstring(chart.svg)
    return [path.get('d', '') for path in root if name in path.get('class', '').split()]



def test_ranking() -> None:
    chart = charts.ranking([4.0, 1.0, 9.0, 0.0], [False, True, False, True])
    assert chart.says == ['channel 3: 0, removed', 'channel 1: 1, removed', 'channel 0: 4, kept', 'channel 2: 9, kept']
    kept = re.findall(r'M(\d+) [\d.]+v-([\d.]+)', paths(chart, 'kept')[0])
    gone = re.findall(r'M(\d+) [\d.]+v-([\d.]+)', paths(chart, 'gone')[0])
    assert [at for at, _ in gone] == ['0', '1'] and [at for at, _ in kept] == ['2', '3']
    assert [float(height) for _, height in kept] == pytest.approx([98 * 2 / 3, 98], abs=0.1)
    assert float(gone[1][1]) == pytest.approx(98 / 3, abs=0.1)
    assert paths(chart, 'cut') == ['M2.00 0V100']


def test_a_ranking_without_a_clean_cut() -> None:
    chart = charts.ranking([1.0, 2.0, 3.0], [False, True, False])
    assert not paths(chart, 'cut') and paths(chart, 'gone')[0].startswith('M1 ')


def test_negative_scores_hang_from_zero() -> None:
    chart = charts.ranking([-4.0, 4.0], [True, False])
    (below,), (above,) = (re.findall(r'M\d+ ([\d.]+)v(-?[\d.]+)', paths(chart, name)[0]) for name in ('gone', 'kept'))
    assert below == ('50.0', '49.0') and above == ('50.0', '-49.0')


def test_many_channels_share_bars() -> None:
    count = 5 * charts.FINEST
    chart = charts.ranking([float(value) for value in range(count)], [value < count // 2 for value in range(count)])
    assert len(chart.says) == count and chart.columns == count
    assert paths(chart, 'gone')[0].count('M') + paths(chart, 'kept')[0].count('M') == charts.FINEST
    assert paths(chart, 'cut') == [f'M{charts.FINEST / 2:.2f} 0V100']


def test_columns() -> None:
    chart = charts.columns(['a.x', 'a.y', 'b'], [1.0, 0.0, 4.0], [2.0, 2.0, 4.0])
    assert re.findall(r'v-([\d.]+)', paths(chart, 'before')[0]) == ['50.0', '50.0', '100.0']
    assert re.findall(r'M([\d.]+) 100v-([\d.]+)', paths(chart, 'kept')[0]) == [('0.1', '25.0'), ('2.1', '100.0')]
    assert chart.segments == [('a', 2), ('b', 1)] and (chart.top, chart.bottom) == ('4', '0')


def test_matrix() -> None:
    chart = charts.matrix(['cat', 'dog'], ['a', 'b'], [[0.0, 0.4], [0.8, 0.2]], 'goes')
    assert chart.says == ['cat, a: 0% goes', 'cat, b: 40% goes', 'dog, a: 80% goes', 'dog, b: 20% goes']
    assert re.findall(r'opacity="([\d.]+)" d="M([\d.]+) ([\d.]+)', chart.svg) == [
        ('0.50', '1.04', '0.06'), ('1.00', '0.04', '1.06'), ('0.25', '1.04', '1.06')]


def test_lines() -> None:
    chart, legend = charts.lines([Line('one', [(0.8, 0.9, 0.0), (0.5, 0.7, 0.1)]), Line('none', []),
                                  Line('two', [(0.8, 0.8, 0.0), (0.5, 0.2, 0.0)])], 1.0)
    assert legend == [('one', 0), ('two', 1)] and len(paths(chart, 'band')) == 1
    assert chart.says == ['80.0% left: one 0.9; two 0.8', '50.0% left: one 0.7 ± 0.1; two 0.2']
    assert chart.spots == [1.0, 99.0]
    (x0, y0), (x1, y1) = [tuple(map(float, place.split())) for place in paths(chart, 's1')[0][1:].split('L')]
    assert (x0, x1) == (1.0, 99.0) and y0 < y1
    assert y0 == pytest.approx((1.032 - 0.8) / (1.032 - 0.168) * 100, abs=0.01)  # 4 % of margin on either side


@pytest.mark.parametrize('value, text', [(0.5, '0.5'), (1234, '1.23 k'), (5e6, '5 M'), (2.5e9, '2.5 G'), (3e12, '3 T')])
def test_amounts(value: float, text: str) -> None:
    assert charts.amount(value) == text
