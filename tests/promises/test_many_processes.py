'''Collecting on two processes; each test waits for them with a limit, so that a hang is a failure.'''

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Residual, apart, composite, images, labels, seeded
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import zennit_prune as zp
from zennit_prune.relevance import _streaming as streaming
from zennit_prune.util._loaders import batches

COUNT = 11


def pruner() -> zp.Pruner:
    return zp.Pruner(seeded(Residual()), composite(), images())


def dataset(count: int = COUNT) -> TensorDataset:
    return TensorDataset(images(count), labels(count))


def shard(rank: int, world: int = 2, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(dataset(), 2, sampler=DistributedSampler(dataset(), world, rank, shuffle))


def uneven(rank: int) -> list[Any]:
    '''Nine samples for rank 0, two for rank 1.'''
    part = slice(0, 9) if rank == 0 else slice(9, COUNT)
    return list(zip(images(COUNT)[part].split(2), labels(COUNT)[part].split(2)))


def endless() -> Iterator[Any]:
    while True:
        yield images(2), labels(2)


def failing(rank: int) -> Iterator[Any]:
    '''Rank 1 meets a bad label in its third batch, while rank 0 would go on forever.'''
    if rank == 0:
        yield from endless()
    yield from uneven(0)[:2]
    yield images(2), torch.tensor([0, 9])


def raising() -> Iterator[Any]:
    yield images(2), labels(2)
    raise OSError('the disk is gone')


def short(rank: int) -> Iterator[Any]:
    '''Ends after the second batch on rank 0, in an error.'''
    for number, batch in enumerate(uneven(rank)):
        if (rank, number) == (0, 2):
            raise OSError('the disk is gone')
        yield batch


# what both processes do, one after the other; each gives a Relevance, or an error that is kept as text
STEPS: dict[str, Callable[[int, Path], zp.Relevance]] = {
    'sampler': lambda rank, _: pruner().collect(shard(rank), progress=False),
    'shuffled': lambda rank, _: pruner().collect(shard(rank, shuffle=True), progress=False),
    'uneven': lambda rank, _: pruner().collect(uneven(rank), progress=False),
    'rank without samples': lambda rank, _: pruner().collect(
        [] if rank else [(images(COUNT), labels(COUNT))], progress=False
    ),
    'classes': lambda rank, _: pruner().collect(uneven(rank), classes=(0, 3), progress=False),
    'bad label': lambda rank, _: pruner().collect(failing(rank), progress=False),
    'loader raises': lambda rank, _: pruner().collect(raising() if rank == 0 else endless(), progress=False),
    'not finite': lambda rank, _: pruner().collect(
        [(images(2) / (1 - rank), labels(2))] if rank else endless(), progress=False
    ),
    'no loader': lambda rank, _: pruner().collect(3 if rank else endless(), progress=False),
    'no sample anywhere': lambda rank, _: pruner().collect([], progress=False),
    'other settings': lambda rank, _: pruner().collect(
        uneven(rank), aggregate='abs' if rank else 'signed', progress=False
    ),
    'left out': lambda rank, _: pruner().collect(
        [*uneven(rank), (images(1) / 0, labels(1))], nonfinite='skip', progress=False
    ),
    'interrupted': lambda rank, folder: pruner().collect(short(rank), checkpoint=folder / 'collect', progress=False),
    'interrupted files': lambda rank, folder: files(folder),
    'resumed': lambda rank, folder: pruner().collect(uneven(rank), checkpoint=folder / 'collect', progress=False),
    'resumed files': lambda rank, folder: files(folder),
    'pruned': lambda rank, _: weights(pruner().prune(uneven(rank), HALF, repair='batchnorm', progress=False)),
    'iterated': lambda rank, folder: iterated(rank, folder),
    'progress': lambda rank, _: pruner().collect(uneven(rank)),
}


HALF = zp.Budget(flops=0.5)


def weights(result: zp.pipeline.Result) -> zp.Relevance:
    '''A network in the guise of scores.'''
    tensors = {name: tensor.flatten() for name, tensor in result.model.state_dict().items()}
    return zp.Relevance(tensors, info={'evaluations': [step.evaluation for step in result.history]})


def iterated(rank: int, folder: Path) -> zp.Relevance:
    '''Interrupted on both ranks, and resumed; every rank evaluates something else.'''
    def stop(step: zp.pipeline.Step) -> None:
        if step.number == 1:
            raise OSError('the disk is gone')

    evaluate = (lambda network: 0.9 - rank / 2)  # noqa: E731
    for callback in (stop, None):
        try:
            result = pruner().iterate(uneven(rank), HALF, 0.2, repair='batchnorm', callback=callback, min_score=0.5,
                                      evaluate=evaluate, checkpoint=folder / 'run', progress=False)  # fmt: skip
        except OSError:
            distributed.barrier()
    return weights(result)


def files(folder: Path) -> Any:
    distributed.barrier()
    found = sorted(path.name for path in folder.glob('collect*'))
    distributed.barrier()
    raise RuntimeError(' '.join(found))


def main(rank: int, folder: Path, steps: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', f'file://{folder}/{os.environ["MEETING"]}', timedelta(seconds=40), 2, rank
    )  # fmt: skip
    said = {}
    for step in steps:
        begin = time.monotonic()
        try:
            STEPS[step](rank, folder).save(folder / f'{step}.{rank}')
        except Exception as error:
            said[step] = f'{type(error).__name__}: {error}'
        said[f'{step}, seconds'] = str(time.monotonic() - begin)
        (folder / f'said.{rank}').write_text(json.dumps(said))
    if 'killed' in steps:
        os._exit(0)  # gloo may abort while it tears down a group that lost a process
    distributed.barrier()
    distributed.destroy_process_group()


def killed(rank: int, folder: Path) -> zp.Relevance:
    '''Rank 1 is killed in its second batch.'''
    streaming.EVERY = 0.0

    def loader() -> Iterator[Any]:
        for number, batch in enumerate(uneven(rank) if rank == 0 else uneven(0)):
            if (rank, number) == (1, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    return pruner().collect(loader(), checkpoint=folder / 'collect', progress=False)


def both(rank: int, folder: Path) -> zp.Relevance:
    return pruner().collect(uneven(0), checkpoint=folder / 'collect', progress=False)


STEPS.update({'killed': killed, 'after the kill': both})


def launch(folder: Path, steps: list[str]) -> list[subprocess.CompletedProcess[str]]:
    '''Two processes that do these steps, waited for at most a minute.'''
    environment = {**os.environ, 'MEETING': steps[0].replace(' ', '-'), 'PYTHONPATH': os.pathsep.join(sys.path)}
    code = (
        'import sys; from pathlib import Path; from promises import test_many_processes as t; '
        't.main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])'
    )
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code, str(rank), str(folder), *steps],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        limit, found = time.monotonic() + 60, []
        for process in processes:
            _, errors = process.communicate(timeout=max(1, limit - time.monotonic()))
            found.append(subprocess.CompletedProcess(process.args, process.returncode, stderr=errors))
        return found
    finally:
        for process in processes:
            process.kill()


class Two:
    '''What two processes brought forth.'''

    def __init__(self, folder: Path, steps: list[str]):
        self.folder = folder
        self.ended = launch(folder, steps)
        self.said = [
            json.loads(path.read_text()) if (path := folder / f'said.{rank}').exists() else {} for rank in range(2)
        ]

    def relevance(self, step: str) -> list[zp.Relevance]:
        assert not any(step in said for said in self.said), [said.get(step) for said in self.said]
        return [zp.Relevance.load(self.folder / f'{step}.{rank}') for rank in range(2)]

    def errors(self, step: str) -> list[str]:
        assert all(float(said[f'{step}, seconds']) < 20 for said in self.said)
        return [said[step] for said in self.said]


@pytest.fixture(scope='module')
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    found = Two(tmp_path_factory.mktemp('two'), [step for step in STEPS if 'kill' not in step])
    assert [process.returncode for process in found.ended] == [0, 0], [process.stderr for process in found.ended]
    return found


def single(**options: Any) -> zp.Relevance:
    return pruner().collect((images(COUNT), labels(COUNT)), progress=False, **options)


@pytest.mark.parametrize(
    'step', ['sampler', 'shuffled', 'uneven', 'rank without samples', 'classes', 'resumed', 'progress']
)
def test_shards_add_up(two: Two, step: str) -> None:
    '''To the scores of a single process, float64 rounding apart from what batches of another size round; with the same
    bits, and thus the same plan, everywhere.'''
    expected = single(**({'classes': (0, 3)} if step == 'classes' else {}))
    found = two.relevance(step)
    assert found[0].info == found[1].info == expected.info
    for name in expected:
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0]._halves[name], found[1]._halves[name])
        assert apart(found[0][name], expected[name]) <= 1e-6
    plans = [pruner().plan(each, zp.Budget(flops=0.6)) for each in found]
    assert plans[0].removed == plans[1].removed and plans[0].removed


@pytest.mark.parametrize('step', ['pruned', 'iterated'])
def test_all_processes_get_the_same_network(two: Two, step: str) -> None:
    '''It is repaired on the references of all, and ends where the first process says.'''
    found = two.relevance(step)
    assert found[0].info == found[1].info and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    loader = [*uneven(0), *uneven(1)]
    options: dict[str, Any] = {'repair': 'batchnorm', 'progress': False}
    expected = pruner().prune(loader, HALF, **options) if step == 'pruned' else pruner().iterate(
        loader, HALF, 0.2, evaluate=lambda network: 0.9, **options)  # fmt: skip
    assert all(apart(found[0][name], values) <= 1e-5 for name, values in weights(expected).items() if values.any())
    assert weights(expected).info == found[0].info and not (two.folder / 'run').exists()


def test_scores_equal_those_of_one_process_that_sees_the_same_batches(two: Two) -> None:
    expected = pruner().collect([*uneven(0), *uneven(1)], progress=False)
    assert all(apart(two.relevance('uneven')[0][name], expected[name]) <= 1e-14 for name in expected)


FAILED = {
    'bad label': (1, 'label 9 is out of range'),
    'loader raises': (0, 'OSError: the disk is gone'),
    'not finite': (1, 'sample 0 of the stream'),
    'no loader': (1, 'a int does not'),
}


@pytest.mark.parametrize('step', FAILED)
def test_a_rank_that_fails_ends_the_others(two: Two, step: str) -> None:
    rank, message = FAILED[step]
    errors = two.errors(step)
    assert message in errors[rank] and 'rank' not in errors[rank]
    assert f'PruneError: rank {rank} of 2 failed, so rank {1 - rank} stopped, too: ' in errors[1 - rank]
    assert message in errors[1 - rank]


def test_no_sample_anywhere_is_an_error_everywhere(two: Two) -> None:
    assert all('no sample' in error for error in two.errors('no sample anywhere'))


def test_settings_must_agree(two: Two) -> None:
    assert all("differ in aggregate: '" in error for error in two.errors('other settings'))


def test_samples_left_out_are_added_up(two: Two) -> None:
    assert all(found.info['skipped'] == 2 and found.info['samples'] == COUNT for found in two.relevance('left out'))


def test_each_rank_has_a_checkpoint(two: Two) -> None:
    assert 'OSError' in two.errors('interrupted')[0] and 'rank 0 of 2 failed' in two.errors('interrupted')[1]
    assert two.errors('interrupted files') == ['RuntimeError: collect.0-of-2 collect.1-of-2'] * 2
    assert two.errors('resumed files') == ['RuntimeError: '] * 2


def test_resuming_gives_the_bits_of_an_uninterrupted_run(two: Two) -> None:
    found, expected = two.relevance('resumed')[0], two.relevance('uneven')[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_progress_is_shown_on_the_first_rank_only(two: Two) -> None:
    assert ['relevance:   0%' in process.stderr for process in two.ended] == [True, False]


def test_a_killed_process_ends_the_others_and_all_resume(tmp_path: Path) -> None:
    died = Two(tmp_path, ['killed'])
    assert [process.returncode for process in died.ended] == [0, -signal.SIGKILL]
    assert 'PruneError: rank 0 of 2 lost the other processes' in died.said[0]['killed']
    assert {path.name for path in tmp_path.glob('collect*')} == {'collect.0-of-2', 'collect.1-of-2'}
    resumed = Two(tmp_path, ['after the kill']).relevance('after the kill')
    expected = pruner().collect(uneven(0) * 2, progress=False)
    assert resumed[0].info['samples'] == 18
    assert all(apart(resumed[0][name], expected[name]) <= 1e-14 for name in expected)


# --- samplers that repeat samples
@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize(('count', 'world', 'size'), [(11, 2, 2), (10, 4, 3), (2, 4, 1), (7, 3, 8), (8, 2, 4)])
def test_repeated_samples_are_left_out(count: int, world: int, size: int, shuffle: bool, drop_last: bool) -> None:
    numbers = TensorDataset(torch.arange(count))
    found = []
    for rank in range(world):
        sampler = DistributedSampler(numbers, world, rank, shuffle, drop_last=drop_last)
        loaders = (DataLoader(numbers, size, sampler=sampler),
                   DataLoader(numbers, batch_sampler=BatchSampler(sampler, size, False)))  # fmt: skip
        one, other = ([number for batch, _ in batches(loader) for number in batch.tolist()] for loader in loaders)
        assert one == other
        found += one
    assert len(found) == len(set(found)) == (count - count % world if drop_last else count)
