'''The report in a real browser: it needs no network, fits every screen, and can be used by keyboard.'''
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from looking.test_report import HOSTILE, hostile_report, made_up_sweep
from small import Residual, images, labels

import zennit_prune as zp

pytest.importorskip('jinja2')
sync_api = pytest.importorskip('playwright.sync_api', reason='no playwright: pip install playwright')

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='no browser: install chromium or google-chrome')


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture(scope='module', params=['whole', 'hostile'])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp('report') / 'report.html'
    if request.param == 'hostile':
        hostile_report(path)
        return path
    pruner = zp.Pruner(Residual(), None, images(1))
    loader = images(8), labels(8)
    relevance = pruner.collect(loader, progress=False, exemplars=4)
    zp.report(pruner, pruner.plan(relevance, zp.Budget(flops=0.6)), relevance, images(12, seed=3), labels(12), path,
              references=loader, sweep=made_up_sweep(), evaluation={'accuracy': (0.9, 0.8)}, progress=False)
    return path


@pytest.fixture
def opened(browser: Any, path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    '''The page, watched for errors and requests.'''
    width, theme = getattr(request, 'param', (1440, 'light'))
    context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=theme)
    page = context.new_page()
    complaints: list[str] = []
    page.on('console', lambda message: complaints.append(message.text))
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.on('dialog', lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on('request', lambda one: one.url.startswith(('data:', path.as_uri())) or complaints.append(one.url))
    page.goto(path.as_uri())
    yield page
    assert not complaints
    context.close()


@pytest.mark.parametrize('opened', [(width, theme) for width in (390, 1440) for theme in ('light', 'dark')],
                         indirect=True)
def test_it_fits_the_screen(opened: Any) -> None:
    opened.evaluate('document.querySelectorAll("details").forEach((one) => { one.open = true; })')
    wide, inner = opened.evaluate('[document.documentElement.scrollWidth, innerWidth]')
    assert wide <= inner
    outside = opened.evaluate('''
        [...document.querySelectorAll("section, figure, img, h1, h2, p, .card, .plot")]
        .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => one.outerHTML.slice(0, 80))''')
    assert not outside


@pytest.mark.parametrize('opened', [(1440, 'light'), (1440, 'dark')], indirect=True, ids=['light', 'dark'])
def test_themes_differ_and_can_be_read(opened: Any, request: pytest.FixtureRequest) -> None:
    def luminance(what: str) -> float:
        colour = f'getComputedStyle(document.querySelector("section")).{what}'
        rgb = opened.evaluate(f'{colour}.match(/[\\d.]+/g).map(Number)')
        linear = [c / 3294.6 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    ink, paper = luminance('color'), luminance('backgroundColor')
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
    assert (paper < 0.1) == ('dark' in request.node.name)


def test_charts_and_images_are_there(opened: Any) -> None:
    opened.evaluate('document.querySelectorAll("details").forEach((one) => { one.open = true; })')
    sizes = opened.evaluate('[...document.images].map((one) => one.naturalWidth)')
    assert len(sizes) >= 16 and min(sizes) > 0
    boxes = opened.evaluate('''[...document.querySelectorAll(".plot svg")].map((one) => one.getBoundingClientRect())
        .map((box) => [box.width, box.height])''')
    assert len(boxes) >= 5 and all(width > 60 and height > 15 for width, height in boxes)
    assert opened.evaluate('[...document.querySelectorAll(".plot svg")].every((one) => one.querySelector("path"))')


def focused(page: Any, script: str, presses: int = 400) -> None:
    '''Press Tab until the focus is where ``script`` is true of it.'''
    for _ in range(presses):
        page.keyboard.press('Tab')
        if page.evaluate(f'(({script}))(document.activeElement)'):
            return
    raise AssertionError(f'not reached by Tab: {script}')


def test_sections_by_keyboard(opened: Any) -> None:
    focused(opened, '(one) => one.matches("nav a[href=\'#checks\']")')
    before = opened.evaluate('scrollY')
    opened.keyboard.press('Enter')
    top = 'document.querySelector("#checks").getBoundingClientRect().top'
    for _ in range(50):  # it scrolls smoothly
        opened.wait_for_timeout(100)
        if 0 <= opened.evaluate(top) < 900:
            break
    assert 0 <= opened.evaluate(top) < 900
    assert opened.evaluate('location.hash') == '#checks' and opened.evaluate('scrollY') > before


def test_details_by_keyboard(opened: Any) -> None:
    focused(opened, '(one) => one.tagName === "SUMMARY" && !one.parentElement.open')
    opened.keyboard.press('Enter')
    assert opened.evaluate('document.activeElement.parentElement.open')


def test_charts_by_keyboard_and_pointer(opened: Any) -> None:
    focused(opened, '(one) => one.matches("#plan .plot")')
    read = 'document.activeElement.parentElement.querySelector("output").textContent'
    first = opened.evaluate(read)
    opened.keyboard.press('ArrowRight')
    second = opened.evaluate(read)
    opened.keyboard.press('Home')
    assert 'channels kept' in first and 'channels kept' in second and first != second == opened.evaluate(
        'JSON.parse(document.activeElement.querySelector("script").textContent)[1]')
    assert opened.evaluate(read) == first
    opened.keyboard.press('Tab')
    assert opened.evaluate('document.querySelector("#plan output").textContent') == ''
    frame = opened.locator('#plan .frame').first
    frame.scroll_into_view_if_needed()
    opened.wait_for_timeout(1000)
    box = frame.bounding_box()
    opened.mouse.move(box['x'] + 2, box['y'] + 5)
    assert opened.evaluate('document.querySelector("#plan output").textContent') == first


def test_hostile_names_run_nothing(opened: Any, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params['path'] == 'hostile':
        assert HOSTILE in opened.inner_text('h1') and HOSTILE in opened.title()
    assert not opened.evaluate('document.querySelectorAll("img:not([src^=\'data:\'])").length')
