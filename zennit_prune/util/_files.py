'''Write files of tensors and JSON, which appear only when complete, and check them when they are read.'''
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import PruneError, shown

VERSION = '1'


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str],
                  kind: str) -> None:
    '''Write a safetensors file of a ``kind`` that :func:`read_tensors` asks for.'''
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _appear(path, lambda unfinished: save_file(data, unfinished, {**metadata, 'format': kind, 'version': VERSION}))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    '''Write a text file, in UTF-8.'''
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    '''Write a file of any content.'''
    _appear(path, lambda unfinished: Path(unfinished).write_bytes(content))


def refuse_path_first(call: str, *objects: object) -> None:
    '''Raise if a path stands where an object of a call such as ``'report(pruner, plan, path=path)'`` belongs.'''
    for value in objects:
        if isinstance(value, (str, os.PathLike)):
            raise PruneError(f'{value!r} stands where an object belongs: objects come first and the path last, call '
                             f'{call}.')


def check_path(path: object, call: str) -> None:
    '''Refuse anything but a path in the place of the path.'''
    if not isinstance(path, (str, os.PathLike)):
        raise PruneError(f'a path is needed, not {shown(path)}: the order of arguments is {call}.')


def check_folder(path: str | os.PathLike[str]) -> None:
    '''Refuse a file in a folder that does not exist.'''
    if not Path(path).absolute().parent.is_dir():
        raise PruneError(f'there is no folder for {os.fspath(path)!r}: make it first.')


def _appear(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    '''Write a temporary file beside the target and rename it, so that an interruption leaves no partial file.'''
    unfinished = f'{os.fspath(path)}.unfinished'
    check_folder(path)
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def check_absent(folder: Path, names: Sequence[str]) -> None:
    '''Refuse a folder that has files of these names.'''
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise PruneError(f'{str(folder)!r} has {", ".join(there)} already: name another folder by --out, or give '
                         '--force to replace them.')


@contextmanager
def all_at_once(folder: Path, names: Sequence[str], replace: bool = False) -> Iterator[Path]:
    '''Yield a new folder to write files into, which go to ``folder`` when the block is complete.

    Until then, files are in ``<folder>.unfinished-<number of the process>`` beside it, which is removed after an error.
    An interruption leaves nothing in ``folder`` before that, and whole files only after.

    Parameters
    ----------
    folder: pathlib.Path
        The folder, which is created if needed.
    names: sequence of str
        The files that may be written.
    replace: bool
        Whether files of these names are removed from ``folder``, so that files of two runs do not mix.

    Raises
    ------
    PruneError
        If one of ``names`` is in ``folder`` already, or the folder cannot be made.
    '''
    unfinished = folder.with_name(f'{folder.name}.unfinished-{os.getpid()}')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise PruneError(f'no folder can be made at {str(folder)!r}: {error}.') from error
    try:
        yield unfinished
        folder.mkdir(exist_ok=True)
        if replace:
            for name in names:
                (folder / name).unlink(missing_ok=True)
        check_absent(folder, names)
        for path in unfinished.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    '''Read the tensors and the metadata of a file.

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
