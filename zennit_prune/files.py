'''Files of tensors and JSON: they appear when they are complete, and are checked when they are read.'''
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import PruneError

VERSION = '1'


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str],
                  kind: str) -> None:
    '''Write a safetensors file of a ``kind`` that :func:`read_tensors` asks for.'''
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _appear(path, lambda unfinished: save_file(data, unfinished, {**metadata, 'format': kind, 'version': VERSION}))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    '''Write a text file, in UTF-8.'''
    _appear(path, lambda unfinished: Path(unfinished).write_text(text, encoding='utf-8'))


def check_folder(path: str | os.PathLike[str]) -> None:
    '''Ask for a folder to write the file into.'''
    if not Path(path).absolute().parent.is_dir():
        raise PruneError(f'there is no folder for {os.fspath(path)!r}: make it first.')


def _appear(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    '''Write beside the file, then put it in its place: whoever is killed in between leaves no half of it.'''
    unfinished = f'{os.fspath(path)}.unfinished'
    check_folder(path)
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    '''Tensors and metadata of a file.

    Raises
    ------
    PruneError
        If it is no safetensors file, of another kind or of another version.
    '''
    name = repr(os.fspath(path))
    try:
        with safe_open(os.fspath(path), 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise PruneError(f'{name} is no {kind}: {error}.') from error
    if metadata.get('format') != kind:
        raise PruneError(f'{name} is no {kind}: its metadata lack "format": "{kind}".')
    if metadata.get('version') != VERSION:
        raise PruneError(f'{name} has version {metadata.get("version")!r}; this release reads version {VERSION}.')
    return tensors, metadata
