'''Which architectures are pruned exactly, how much of them can be pruned, and what is refused.

Every network of torchvision (classifiers, segmentation, video; detectors as a whole and as a stack of backbone and
heads) and one small network of a hundred families of timm, with random weights in float64. Half of every group is
removed at random; the pruned network must be proven, and differ from the masked original by rounding only. Each network
runs in a process of its own, so that one that crashes or takes too long does not end the others.

    python benchmarks/coverage.py [torchvision | segmentation | detection | video | timm | network ...]
'''
from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp

TV = torchvision.models
SECONDS = 600
FIXED = {'inception_v3': 299, 'maxvit_t': 224}
FRAMES = {'s3d': (16, 224), 'mvit_v1_b': (16, 224), 'mvit_v2_s': (16, 224)}
TIMM = '''
    beit_base_patch16_224 halonet_h1 lambda_resnet26t botnet26t_256 eca_botnext26ts_256 repvgg_a0 mobileone_s0 gernet_s
    cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240
    csatv2 cs3darknet_focus_s cspresnet50 cspnext_tiny davit_tiny deit_tiny_patch16_224 deit3_small_patch16_224
    densenet121 dla46_c dla34 dpn48b dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mnasnet_050
    efficientnet_b0 efficientnetv2_rw_t mixnet_s tinynet_e mobilenetv2_035 fbnetc_100 spnasnet_100 efficientvim_m1
    efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    ghostnet_050 ghostnetv2_100 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small lcnet_035 levit_128s lowformer_b0 mambaout_femto
    coatnet_pico_rw_224 maxvit_pico_rw_256 poolformer_s12 poolformerv2_s12 caformer_s18 mixer_s32_224 gmlp_ti16_224
    resmlp_12_224 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilevit_xxs mobilevitv2_050
    mvitv2_tiny nasnetalarge jx_nest_tiny nextvit_small nf_resnet26 dm_nfnet_f0 eca_nfnet_l0 pit_ti_224 pnasnet5large
    pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvit_m1 res2net50_14w_8s res2next50
    resnest14d resnet18 resnet26d seresnext26t_32x4d ecaresnet26t resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small
    twins_pcpvt_small vgg11_bn visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224
    vitamin_small_224 volo_d1_224 ese_vovnet19b_slim legacy_xception xception41p xcit_nano_12_p16_224'''.split()


class Detector(nn.Module):
    '''The parts of a torchvision detector that return tensors of known shape: backbone and heads, no boxes.

    What a region head is given instead of aligned regions is the features pooled to their size.
    '''

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.whole = whole

    def forward(self, x: torch.Tensor) -> Any:
        whole: Any = self.whole
        features = whole.backbone(x)
        features = list(features.values()) if isinstance(features, dict) else [features]
        if not hasattr(whole, 'roi_heads'):
            return whole.head(features)
        outputs = [*whole.rpn.head(features)]
        heads = whole.roi_heads
        outputs += heads.box_predictor(heads.box_head(F.adaptive_avg_pool2d(features[0], 7)))
        for kind in ('mask', 'keypoint'):
            if getattr(heads, f'{kind}_head', None) is not None:
                regions = F.adaptive_avg_pool2d(features[0], 14)
                outputs.append(getattr(heads, f'{kind}_predictor')(getattr(heads, f'{kind}_head')(regions)))
        return outputs


class Case(NamedTuple):
    '''A network, and how to build it with an example.'''

    name: str
    build: Callable[[], tuple[nn.Module, Any]]


def cases(kind: str) -> list[Case]:
    '''The networks of a kind.'''
    if kind == 'torchvision':
        return [Case(name, lambda name=name: _classifier(name)) for name in TV.list_models(TV)]
    if kind == 'segmentation':
        return [Case(name, lambda name=name: (TV.get_model(name, weights=None, weights_backbone=None), _image(64)))
                for name in TV.list_models(TV.segmentation)]
    if kind == 'video':
        return [Case(name, lambda name=name: _video(name)) for name in TV.list_models(TV.video)]
    if kind == 'detection':
        names = TV.list_models(TV.detection)
        return [Case(f'{name} (backbone and heads)', lambda name=name: (Detector(_detector(name)), _detected(name)))
                for name in names] + [Case(name, lambda name=name: (_detector(name), ([_detected(name)[0]],)))
                                      for name in names]
    if kind == 'timm':
        return [Case(f'timm {name}', lambda name=name: _timm(name)) for name in TIMM]
    found = [case for group in ('torchvision', 'segmentation', 'detection', 'video') for case in cases(group)
             if case.name == kind]
    return found or [Case(f'timm {kind}', lambda: _timm(kind))]


def _image(size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size)


def _classifier(name: str) -> tuple[nn.Module, Any]:
    options: dict[str, Any] = {'init_weights': True} if name in ('googlenet', 'inception_v3') else {}
    size = FIXED.get(name, 64)
    if name.startswith('vit_'):
        size = options['image_size'] = 2 * int(name.rpartition('_')[2])
    if name.startswith('swin'):
        size = 224  # below, windows shrink
    return TV.get_model(name, weights=None, **options), _image(size)


def _video(name: str) -> tuple[nn.Module, Any]:
    frames, size = FRAMES.get(name, (8, 64))
    return TV.get_model(name, weights=None), torch.zeros(1, 3, frames, size, size)


def _detector(name: str) -> nn.Module:
    return TV.get_model(name, weights=None, weights_backbone=None)


def _detected(name: str) -> torch.Tensor:
    return _image(300 if name.startswith('ssd') else 96)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm
    model = timm.create_model(name, pretrained=False).eval()
    network = copy.deepcopy(model).to('meta')
    for size in (64, 128):
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size, device='meta'))
        except Exception:
            continue
        return model, _image(size)
    return model, torch.zeros(1, *model.default_cfg['input_size'])


def where_every_channel_matters(model: nn.Module) -> nn.Module:
    '''Random values for what starts constant: norms, layer scales, heads of zeros, gains and position tables.'''
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.reshape(-1)[0]).all()):
                if name.endswith('bias') or parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
                else:
                    parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer.normal_(0, 0.1)
            elif name.endswith('running_var'):
                buffer.uniform_(0.5, 2)
    return model


def measure(case: Case) -> dict[str, Any]:
    '''What one network gives.'''
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter('ignore')
    row: dict[str, Any] = {'name': case.name}
    try:
        model, example = case.build()
    except Exception as error:
        return {**row, 'refusal': f'it cannot be built: {type(error).__name__}: {error}'}
    model = where_every_channel_matters(model.double().eval())
    example = torch.utils._pytree.tree_map(lambda tensor: tensor.double(), example)
    start = time.process_time()
    try:
        graph = zp.trace(model, example)
        row['groups'] = len(graph.groups)
        row['parameters'], _, row['outputs'] = graph.reach
        if not graph.groups:
            reasons = Counter(reason for reason in graph.locked.values())
            return {**row, 'refusal': f'nothing is in reach: {reasons.most_common(1)[0][0]}'}
        generator = np.random.default_rng(0)
        plan = zp.Plan(graph, {group.name: group.order_by_block(generator.random(group.size))[
            :group.size // group.step // 2 * group.step].tolist() for group in graph.groups})
        small = plan.apply(model, verify=False)
        row['seconds'] = time.process_time() - start
        row['error'] = zp.verify(model, small, plan, example)
    except zp.PruneError as error:
        row['refusal'] = str(error)
    except Exception as error:
        row['failure'] = f'{type(error).__name__}: {error}'
    return row


def _send(case: Case, connection: Any) -> None:
    connection.send(measure(case))


def measured(chosen: Iterable[Case], seconds: float = SECONDS) -> Iterable[dict[str, Any]]:
    '''Measure each network in a process of its own.'''
    context = multiprocessing.get_context('fork')
    for case in chosen:
        receiver, sender = context.Pipe(False)
        process = context.Process(target=_send, args=(case, sender), daemon=True)
        process.start()
        sender.close()
        try:
            yield receiver.recv() if receiver.poll(seconds) else {'name': case.name, 'failure': 'it took too long'}
        except EOFError:
            yield {'name': case.name, 'failure': 'its process ended'}
        process.terminate()
        process.join()


def line(row: dict[str, Any]) -> str:
    '''One row of the table.'''
    if 'failure' in row or 'refusal' in row:
        said = f'**fails**: {row["failure"]}' if 'failure' in row else f'refused: {row["refusal"]}'
        verdict = ' '.join(said.split()).replace('|', '/')
    else:
        verdict = f'{row["error"]:.0e}'
    shares = [f'{row[key]:.1%}' if key in row else '' for key in ('parameters', 'outputs')]
    seconds = f'{row["seconds"]:.2f}' if 'seconds' in row else ''
    return f'| {row["name"]} | {row.get("groups", "")} | {shares[0]} | {shares[1]} | {verdict} | {seconds} |'


def main() -> None:
    '''Print the table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['torchvision', 'segmentation', 'detection', 'video', 'timm'])
    chosen = [case for what in parser.parse_args().what for case in cases(what)]
    if any(case.name.startswith('timm') for case in chosen):
        import timm  # noqa: F401  (once, before the processes are forked)
    print('| network | groups | parameters in reach | output channels in reach | error, or why not | CPU s |')
    print('| --- | --- | --- | --- | --- | --- |')
    for row in measured(chosen):
        print(line(row), flush=True)


if __name__ == '__main__':
    main()
