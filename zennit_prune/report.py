'''``report``: one page that shows what a plan is about to destroy, before anything is cut.'''
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .curves import Sweep
from .plan import Plan
from .pruner import Pruner
from .relevance import Relevance


def report(path: str | os.PathLike[str], pruner: Pruner, plan: Plan, relevance: Relevance | None = None, x: Any = None,
           target: Any = None, *, small: nn.Module | None = None, display: torch.Tensor | None = None,
           class_names: Sequence[str] | None = None, image_names: Sequence[str] | None = None,
           sweep: Sweep | None = None, evaluation: Mapping[str, tuple[Any, Any]] | None = None,
           commands: Sequence[str] | None = None, max_images: int = 16, title: str | None = None,
           progress: bool = True) -> None:
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
        Images to look at, shape (N, C, H, W), as they are fed to the network; the samples that were collected from, in
        their order, for the crops of risky channels.
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
    raise NotImplementedError
