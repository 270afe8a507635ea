'''The main job runs on every device there is, leaves the user's model alone, and ends as it does on the CPU.'''
from __future__ import annotations

from pathlib import Path

import main_job
import pytest
import torch

import zennit_prune as zp


def close(found: torch.Tensor, wanted: torch.Tensor, allowed: float) -> bool:
    '''Whether tensors differ by no more than a share of the largest value.'''
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= allowed * float(wanted.abs().max())


def alike(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    '''Whether two devices agree; in float32, convolutions on a GPU round what they are given to 11 bits.'''
    if dtype is torch.float64:
        return close(found, wanted, 1e-8)
    return float(torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)) > 0.99


def random_states(device: torch.device) -> list[bytes]:
    '''Those of the CPU and of a GPU.'''
    found = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == 'cuda' else [])]
    return [state.numpy().tobytes() for state in found]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_main_job(device: torch.device, dtype: torch.dtype, tmp_path: Path) -> None:
    model = main_job.network(dtype).to(device)
    before, drawn = main_job.state_of(model), random_states(device)
    found = main_job.run(model, device, tmp_path)
    after = main_job.state_of(model)
    assert random_states(device) == drawn
    assert after['parameters'] == before['parameters'] and after['modules'] == before['modules']
    assert after['tensors'] == before['tensors']
    assert all(torch.equal(tensor, before['values'][name]) for name, tensor in after['values'].items())

    outputs = found['outputs']
    for name in ('masked', 'small', 'in place'):
        assert close(outputs[name], outputs['small'], 1e-2 if dtype is torch.float32 else 1e-10), name
    assert close(outputs['loaded'], outputs['repaired'], 1e-4)
    distance = {name: float((outputs[name] - outputs['original']).abs().mean()) for name in ('small', 'repaired')}
    assert distance['repaired'] < distance['small']
    assert found['error'] <= (1e-4 if dtype is torch.float32 else 1e-10)
    assert (found['agreement'] > 0).all()

    wanted = main_job.run(main_job.network(dtype), torch.device('cpu'), tmp_path)
    assert found['groups'] == wanted['groups']
    assert alike(outputs['original'], wanted['outputs']['original'], dtype)
    assert alike(found['heatmap'], wanted['heatmap'], dtype)
    for name, scores in wanted['relevance'].items():
        assert alike(found['relevance'][name], scores, dtype), name
    if dtype is torch.float64:  # else scores that are nearly equal may change places
        assert found['removed'] == wanted['removed']
        for name, output in wanted['outputs'].items():
            assert close(outputs[name], output, 1e-5), name


@pytest.mark.parametrize('criterion', ['gradient', 'taylor', 'taylor-weights', 'activation', 'wanda', 'random', 'l1',
                                       'l2', 'fpgm', 'batchnorm'])
def test_other_criteria(device: torch.device, criterion: str) -> None:
    scores = []
    for where in (device, torch.device('cpu')):
        model = main_job.network(torch.float64).to(where)
        x, y = main_job.data(torch.float64)
        pruner = zp.Pruner(model, None, x[:1].to(where), progress=False)
        scores.append(pruner.collect((x, y), criterion, progress=False))
    for name, wanted in scores[1].items():
        assert close(scores[0][name], wanted, 1e-8), name


@pytest.mark.parametrize('method', ['bias', 'batchnorm'])
def test_other_repairs(device: torch.device, method: str) -> None:
    model = main_job.network().to(device)
    x, _ = main_job.data()
    pruner = zp.Pruner(model.eval(), None, x[:1].to(device), progress=False)
    plan = pruner.plan(pruner.collect(x, 'activation', progress=False), zp.Budget(flops=0.7))
    small = zp.repair(model, plan.apply(model, progress=False), plan, x, method, progress=False)
    assert main_job.devices_of(small) == {x.to(device).device}
    assert torch.isfinite(small(x.to(device))).all()


def test_apply_in_place_with_an_optimizer(device: torch.device) -> None:
    model = main_job.network().train().requires_grad_(True).to(device)
    x, y = (part.to(device) for part in main_job.data())
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> float:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    pruner = zp.Pruner(model, None, x[:1], progress=False)
    pruner.plan(pruner.collect((x, y), progress=False), zp.Budget(flops=0.6)).apply_(model, optimizer)
    assert {value.device for state in optimizer.state.values() for key, value in state.items()
            if key.startswith('exp')} == {x.device}
    assert step() > step() > 0


@pytest.mark.parametrize('teacher', [False, True])
def test_finetune(device: torch.device, teacher: bool) -> None:
    model = main_job.network().requires_grad_(True).to(device)
    said: list[dict[str, float]] = []
    tuned = zp.finetune(model, main_job.data(), 3, teacher=model if teacher else None, validation=0.25, progress=False,
                        callback=said.append)
    assert main_job.devices_of(tuned) == main_job.devices_of(model)
    assert len(said) >= 1 and all(torch.isfinite(torch.tensor(list(each.values()))).all() for each in said)


def test_latency(device: torch.device) -> None:
    model = main_job.network()
    x = main_job.data()[0][:2]
    assert 0 < zp.latency(model, x, device, repeats=3) < 10
    model.to(device)
    assert 0 < zp.latency(model, x.to(device), repeats=3) < 10
    pruner = zp.Pruner(model, None, x.to(device), progress=False)
    table = pruner.latencies(seconds=0.2, progress=False)
    assert any(grid.seconds.max() > 0 for grid in table.grids.values())
    assert table.device.startswith('cpu') == (device.type == 'cpu')


def test_an_interrupted_run_resumes(device: torch.device, tmp_path: Path) -> None:
    model = main_job.network().to(device)
    x, y = main_job.data()
    pruner = zp.Pruner(model, None, x[:1].to(device), progress=False)
    options = {'budget': zp.Budget(flops=0.6), 'step': 0.2, 'progress': False}
    wanted = pruner.iterate((x, y), **options)

    class Stopped(Exception):
        pass

    def stop(step: zp.pipeline._result.Step) -> None:
        if step.number == 1:
            raise Stopped

    with pytest.raises(Stopped):
        pruner.iterate((x, y), **options, checkpoint=tmp_path / 'run', callback=stop)
    found = pruner.iterate((x, y), **options, checkpoint=tmp_path / 'run')
    assert len(found.history) == len(wanted.history) > 2
    assert main_job.devices_of(found.model) == {x.to(device).device}
    if device.type == 'cpu':  # sums on a GPU come in any order
        assert found.plan == wanted.plan
        assert all(torch.equal(tensor, wanted.model.state_dict()[name])
                   for name, tensor in found.model.state_dict().items())


def test_prune_looks_and_chooses(device: torch.device, tmp_path: Path) -> None:
    model = main_job.network().to(device)
    x, y = main_job.data()
    pruner = zp.Pruner(model, None, x[:1].to(device), progress=False)
    result = pruner.prune((x, y), zp.Budget(flops=0.7), 'auto', progress=False)
    shown = x[:2].to(device)
    name = pruner.graph.groups[0].name
    assert pruner.preflight(shown).stages
    assert pruner.heatmap(shown, channel=(name, [0, 1])).shape == (2, 2, 8, 8)
    zp.report(pruner, result.plan, result.relevance, shown, y[:2].to(device), tmp_path / 'report.html',
              small=result.model, progress=False)
    zp.heatmap_image(shown, {'before': pruner.heatmap(shown)}, tmp_path / 'maps.png')
    assert (tmp_path / 'report.html').stat().st_size and (tmp_path / 'maps.png').stat().st_size
