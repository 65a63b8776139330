"""A small program, written by hand in the form in which XLA prints its own."""

import pytest

from mateconv_jax.planning import target
from mateconv_jax.planning.hlo_report import read
from mateconv_jax.planning.roofline import LAUNCH, roofline

GPU = target.GPUS["h100"]
HLO = r"""
HloModule jit_f, is_scheduled=true

%gemm (a: bf16[4096,512], b: bf16[512,1024]) -> f32[4096,1024] {
  %a = bf16[4096,512]{1,0} parameter(0)
  %b = bf16[512,1024]{1,0} parameter(1)
  ROOT %dot.1 = f32[4096,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%lookup (table: f32[6400,512], ids: s32[64]) -> f32[64,512] {
  %table = f32[6400,512]{1,0} parameter(0)
  %ids = s32[64]{0} parameter(1)
  ROOT %gather = f32[64,512]{1,0} gather(%table, %ids), offset_dims={1}
}

%write (cache: bf16[8,512,64], new: bf16[8,1,64], at: s32[]) -> bf16[8,512,64] {
  %cache = bf16[8,512,64]{2,1,0} parameter(0)
  %new = bf16[8,1,64]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[8,512,64]{2,1,0} dynamic-update-slice(%cache, %new, %zero, %at, %zero)
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[4096,512], bf16[512,1024])) -> (s32[], bf16[4096,512], bf16[512,1024]) {
  %carry = (s32[], bf16[4096,512]{1,0}, bf16[512,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %l = bf16[4096,512]{1,0} get-tuple-element(%carry), index=1
  %r = bf16[512,1024]{1,0} get-tuple-element(%carry), index=2
  %product = f32[4096,1024]{1,0} fusion(%l, %r), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  ROOT %next = (s32[], bf16[4096,512]{1,0}, bf16[512,1024]{1,0}) tuple(%i, %l, %r)
}

%turns (carry.1: (s32[], bf16[4096,512], bf16[512,1024])) -> pred[] {
  %carry.1 = (s32[], bf16[4096,512]{1,0}, bf16[512,1024]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (p0: bf16[4096,512], p1: bf16[512,1024], p2: f32[6400,512], p3: s32[64], p4: bf16[8,512,64], p5: bf16[8,1,64], p6: s32[], g: f32[1000000]) -> f32[64,512] {
  %p0 = bf16[4096,512]{1,0} parameter(0)
  %p1 = bf16[512,1024]{1,0} parameter(1)
  %p2 = f32[6400,512]{1,0} parameter(2)
  %p3 = s32[64]{0} parameter(3)
  %p4 = bf16[8,512,64]{2,1,0} parameter(4)
  %p5 = bf16[8,1,64]{2,1,0} parameter(5)
  %p6 = s32[] parameter(6)
  %g = f32[1000000]{0} parameter(7)
  %rows = f32[64,512]{1,0} fusion(%p2, %p3), kind=kLoop, calls=%lookup
  %written = bf16[8,512,64]{2,1,0} fusion(%p4, %p5, %p6), kind=kLoop, calls=%write
  %sent = f32[1000000]{0} all-reduce-start(%g), replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":false}}
  %state = (s32[], bf16[4096,512]{1,0}, bf16[512,1024]{1,0}) tuple(%p6, %p0, %p1)
  %loop = (s32[], bf16[4096,512]{1,0}, bf16[512,1024]{1,0}) while(%state), condition=%turns, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %received = f32[1000000]{0} all-reduce-done(%sent)
  %plain = f32[1000000]{0} all-reduce(%received), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %blas = (bf16[4096,1024]{1,0}, s8[1024]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %attended = (bf16[2,4,64,32]{3,1,2,0}, u8[0]{0}) custom-call(%p5, %p5, %p5), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "64", "64"]}, "mask_type": "CAUSAL"}}
  ROOT %out = f32[64,512]{1,0} copy(%rows)
}
"""


@pytest.fixture(scope="module")
def report():
    return read(HLO)


def test_products_count_as_often_as_their_loop_turns(report):
    one = 2 * 4096 * 1024 * 512
    assert report.matmuls_by_dtype() == {"bf16 x bf16 -> f32": (5, 5 * one), "bf16 x bf16 -> bf16": (1, one)}


def test_causal_attention_is_half_of_the_square_and_backward_five_products(report):
    [attention] = report.attention
    assert (attention.direction, attention.flops) == ("backward", 5 * 2 * 2 * 4 * 64 * 64 * 32 / 2)
    assert report.flops() == 6 * 2 * 4096 * 1024 * 512 + attention.flops


def test_launches(report):
    """Two fusions, in the loop a fusion and its condition five times, two exchanges, two library calls, a copy."""
    assert report.launches() == 2 + 10 + 2 + 2 + 1
    assert report.launches_by_kind()["__triton_gemm"] == 5 and report.launches_by_kind()["all-reduce"] == 2


def test_only_what_is_touched_is_read_and_written(report):
    moved = {kernel.name: kernel.bytes for kernel in report.kernels}
    assert moved["rows"] == 2 * 64 * 512 * 4 + 64 * 4  # rows of the table, and their numbers; not the table
    assert moved["written"] == 2 * 8 * 64 * 2 + 4  # the new part; not the cache
    assert moved["product"] == (4096 * 512 + 512 * 1024) * 2 + 4096 * 1024 * 4
    assert moved["out"] == 2 * 64 * 512 * 4


def test_exchanges(report):
    first, second = report.collectives
    assert (first.opcode, first.dtypes, first.bytes, first.devices, first.is_async) == ("all-reduce", ("f32",), 4e6, 4, True)
    assert [kernel.name for kernel in first.overlapping] == ["less", "product"]
    assert (second.devices, second.is_async, second.overlapping) == (2, False, [])


def test_a_loop_that_does_not_say_how_often_it_turns_is_named():
    assert read(HLO.replace('"known_trip_count":{"n":"5"}', "")).unknown_loops == ["loop"]


def test_the_roofline_by_hand(report):
    bounds = roofline(report, GPU, 8, 1)
    product = 2 * 4096 * 1024 * 512 / 989e12
    moved = {kernel.name: kernel.bytes / 3.352e12 for kernel in report.kernels}
    assert moved["product"] > product > moved["blas"] > LAUNCH  # the one writes fp32, the other bf16
    assert bounds.memory == pytest.approx(5 * moved["product"])
    assert bounds.arithmetic == pytest.approx(product)
    assert bounds.launches == pytest.approx(LAUNCH * (5 + 4))  # the loop's condition; both small fusions, attention, the copy
    ring = [2 * (n - 1) / n * 4e6 / 450e9 for n in (4, 2)]
    beside = moved["product"] + LAUNCH
    assert bounds.network == pytest.approx(max(ring[0] - beside, 0) + ring[1])
    assert bounds.network_hidden == pytest.approx(min(ring[0], beside))
    assert bounds.bound == "memory" and bounds.seconds == pytest.approx(
        bounds.memory + bounds.launches + bounds.network + bounds.arithmetic
    )


def test_exchanges_between_hosts_share_their_network(report):
    """Two hosts of one GPU each: 50 GB/s and not 450."""
    near, far = (roofline(report, GPU, 4, hosts).network for hosts in (1, 4))
    assert far > 5 * near
