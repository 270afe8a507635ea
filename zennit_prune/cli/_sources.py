'''Networks for the command line: from torchvision, timm or a Python file, with weights from a file.

Nothing is downloaded.
'''
from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import PruneError
from ..util._display import some

FORMS = 'torchvision:NAME, timm:NAME or FILE.py:FUNCTION'
WRAPPERS = ('state_dict', 'model', 'model_state_dict')  # what training scripts call the weights in their files
PARALLEL = 'module.'  # what DataParallel puts before every name
NAMED = 4  # names in a message


class Source(NamedTuple):
    '''The origin of a network.

    Attributes
    ----------
    kind: str
        ``'torchvision'``, ``'timm'`` or ``'file'``.
    place: str
        The name of the network, or the path of the file.
    function: str
        The function of the file.
    '''

    kind: str
    place: str
    function: str = ''

    @classmethod
    def parse(cls, text: str) -> Source:
        '''Read ``torchvision:NAME``, ``timm:NAME`` or ``FILE.py:FUNCTION``.

        Raises
        ------
        PruneError
            For any other text.
        '''
        place, colon, name = text.rpartition(':')
        if colon and name and place in ('torchvision', 'timm'):
            return cls(place, name)
        if colon and name.isidentifier() and place.endswith('.py'):
            return cls('file', place, name)
        raise PruneError(f'{text!r} names no network: give {FORMS}.')

    def __str__(self) -> str:
        return f'{self.place}:{self.function}' if self.kind == 'file' else f'{self.kind}:{self.place}'


def build(source: Source, outputs: int | None = None) -> nn.Module:
    '''Build a network, in evaluation mode; its weights are random unless a function of the user's sets them.

    Parameters
    ----------
    source: Source
        The origin of the network.
    outputs: int, optional
        The number of outputs of a network of torchvision or timm, where it is not the usual one.

    Raises
    ------
    PruneError
        If there is no such network, or building it fails.
    '''
    if source.kind == 'file':
        if outputs is not None:
            raise PruneError(f'--outputs {outputs} is for networks of torchvision and timm: let {source.function}() in '
                             f'{source.place!r} return a network with {outputs} outputs.')
        network = _called(source)
    else:
        network = _registered(source, {} if outputs is None else {'num_classes': outputs})
    return network.eval()


def _registered(source: Source, options: Mapping[str, Any]) -> nn.Module:
    '''Build a network by its name in a library, which is checked first: some other names would start a download.'''
    create: Callable[..., nn.Module]
    if source.kind == 'torchvision':
        from torchvision import models
        known, create = models.list_models(module=models), models.get_model
        options = {'weights': None, **options}
    else:
        try:
            import timm
        except ImportError as error:
            raise PruneError(f'{source} needs timm: pip install timm.') from error
        known, create = timm.list_models(), timm.create_model
        options = {'pretrained': False, **options}
    if source.place not in known:
        near = difflib.get_close_matches(source.place, known, 3)
        hint = f'do you mean {" or ".join(near)}?' if near else f'see {source.kind}.list_models().'
        raise PruneError(f'{source.kind} has no classifier {source.place!r}: {hint}')
    try:
        return create(source.place, **options)
    except Exception as error:
        raise PruneError(f'{source} cannot be built: {type(error).__name__}: {error}') from error


def _called(source: Source) -> nn.Module:
    '''Return the network that a function in a Python file builds; the file is executed and may import others beside.'''
    path = Path(source.place)
    if not path.is_file():
        raise PruneError(f'there is no file {source.place!r}.')
    folder, name = str(path.absolute().parent), path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules.setdefault(name, module)  # for dataclasses and what else looks its module up
    try:
        spec.loader.exec_module(module)
        function = getattr(module, source.function, None)
        if not callable(function):
            raise PruneError(f'{source.place!r} has no function {source.function!r}.')
        network = function()
    except PruneError:
        raise
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise PruneError(f'{source} fails: {type(error).__name__}: {error} ({Path(where.filename).name}, line '
                         f'{where.lineno}).') from error
    finally:
        sys.path.remove(folder)
    if not isinstance(network, nn.Module):
        raise PruneError(f'{source} returns a {type(network).__name__}: return the network, a torch.nn.Module.')
    return network


def load_weights(network: nn.Module, path: Path) -> list[str]:
    '''Fill a network with the weights of a file, all of them and no others.

    Parameters
    ----------
    network: torch.nn.Module
        Filled in place.
    path: pathlib.Path
        A safetensors file, or one of ``torch.save(network.state_dict(), path)``, read without executing code.

    Returns
    -------
    list of str
        The changes to the file's contents that made them fit, to be shown.

    Raises
    ------
    PruneError
        If the file is no such file, or lacks weights, has others, or weights of other shapes.
    '''
    contents, notes = _read(path), []
    inner = [key for key in WRAPPERS if isinstance(contents.get(key), Mapping)]
    if len(inner) == 1:
        contents = contents[inner[0]]
        notes.append(f'the weights are those under {inner[0]!r} in {path.name}')
    others = [str(key) for key, value in contents.items() if not isinstance(value, torch.Tensor)]
    if others or not contents:
        raise PruneError(f'{str(path)!r} is no file of weights: it holds {some(others, NAMED) or "nothing"}. Save them '
                         'with torch.save(network.state_dict(), path).')
    expected = network.state_dict()
    if all(key.startswith(PARALLEL) for key in contents) and not any(key.startswith(PARALLEL) for key in expected):
        contents = {key.removeprefix(PARALLEL): value for key, value in contents.items()}
        notes.append(f'{PARALLEL!r} is dropped from all names in {path.name}')
    # BatchNorm's counters of batches came with PyTorch 0.4.1, and are of no use here: old files may lack them
    missing = [key for key in expected if key not in contents and not key.endswith('.num_batches_tracked')]
    unexpected = [key for key in contents if key not in expected]
    wrong = [f'{key} is {tuple(contents[key].shape)}, not {tuple(value.shape)}' for key, value in expected.items()
             if key in contents and contents[key].shape != value.shape]
    problems = [f'{what}: {some(names, NAMED)}' for what, names in (
        ('missing', missing), ('unexpected', unexpected), ('of another shape', wrong)) if names]
    if problems:
        heads = bool(wrong) and not missing and not unexpected
        hint = 'a network trained with other classes needs --outputs N.' if heads else 'are they of this network?'
        raise PruneError(f'the weights in {str(path)!r} do not fit the {type(network).__name__}: '
                         f'{"; ".join(problems)}. Hint: {hint}')
    network.load_state_dict({**expected, **contents})
    return notes


def _read(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise PruneError(f'there is no file of weights {str(path)!r}.')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        contents = torch.load(path, map_location='cpu', weights_only=True)
    except (SafetensorError, OSError) as error:
        raise PruneError(f'{str(path)!r} cannot be read: {error}.') from error
    except Exception as error:  # of pickle and of zip files, of many kinds
        raise PruneError(f'{str(path)!r} cannot be read without executing code, or is damaged. Save the weights alone, '
                         'with torch.save(network.state_dict(), path), or as .safetensors.') from error
    if not isinstance(contents, Mapping):
        raise PruneError(f'{str(path)!r} holds a {type(contents).__name__}, not weights by name. Save them with '
                         'torch.save(network.state_dict(), path).')
    return contents


def weights_url(source: Source) -> str | None:
    '''Return the address of the public weights of a network of torchvision, for a hint.'''
    if source.kind != 'torchvision':
        return None
    from torchvision import models
    return str(models.get_model_weights(source.place)['DEFAULT'].url)


def categories(source: Source, outputs: int) -> list[str]:
    '''Return the names of the outputs where torchvision has them for the public weights and their number fits.'''
    if source.kind != 'torchvision':
        return []
    from torchvision import models
    names = list(models.get_model_weights(source.place)['DEFAULT'].meta['categories'])
    return names if len(names) == outputs else []
