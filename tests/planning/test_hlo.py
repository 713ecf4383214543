"""What is sent between devices is read off a program's text as it stands there: kinds, bytes, loops, groups."""

import pytest

from avmae_jax.planning import hlo

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""
GROUPS = 'replica_groups={{0,1,2,3},{4,5,6,7}}'


def module(entry: str, *others: str) -> str:
    return (
        f'HloModule jit_step, is_scheduled=true\n{ADD}\n'
        + '\n'.join(others)
        + f'\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n'
    )


REDUCED = f'{GROUPS}, dimensions={{0}}, to_apply=%add'
# Kind -> a line of it, the bytes of its array, and what share of them each of four devices sends.
LINES = {
    'all-gather': (f'%g = bf16[32,64]{{1,0:T(8,128)}} all-gather(%a), {GROUPS}, dimensions={{0}}', 4096, 0.75),
    'all-reduce': (f'%g = f32[8,64]{{1,0}} all-reduce(%b), channel_id=1, {GROUPS}, to_apply=%add', 2048, 1.5),
    'reduce-scatter': (f'%g = f32[2,64]{{1,0}} reduce-scatter(%b), {REDUCED}', 2048, 0.75),
    'all-to-all': (f'%g = f32[8,64]{{1,0}} all-to-all(%b), {GROUPS}, dimensions={{0}}', 2048, 0.75),
    'collective-permute': ('%g = f32[8,64]{1,0} collective-permute(%b), source_target_pairs={{0,1},{1,0}}', 2048, 1.0),
}
GIVEN = '  %a = bf16[8,64]{1,0} parameter(0)\n  %b = f32[8,64]{1,0} parameter(1)\n'


@pytest.mark.parametrize('kind', LINES)
def test_each_kind_has_the_bytes_of_its_whole_array(kind):
    line, size, share = LINES[kind]
    (found,) = hlo.collectives(module(f'{GIVEN}  ROOT {line}, metadata={{op_name="jit(step)/dot"}}'))
    assert (found.kind, found.array_bytes, found.times, found.overlapped) == (kind, size, 1, False)
    assert found.dtype == ('bf16' if kind == 'all-gather' else 'f32')
    assert found.wire_bytes == size * share
    assert found.where == 'jit(step)/dot'


def test_arrays_that_go_together_are_counted_by_their_types():
    line = f'ROOT %g = (bf16[8,64]{{1,0}}, f32[8,64]{{1,0}}) all-reduce(%a, %b), {GROUPS}, to_apply=%add'
    found = hlo.collectives(module(f'{GIVEN}  {line}'))
    assert [(each.kind, each.dtype, each.array_bytes, each.times) for each in found] == [
        ('all-reduce', 'bf16', 1024, 1), ('all-reduce', 'f32', 2048, 1),
    ]  # fmt: skip


def test_a_loss_is_a_collective_too():
    line = f'ROOT %g = f32[] all-reduce(%s), {GROUPS}, to_apply=%add'
    (found,) = hlo.collectives(module(f'  %s = f32[] parameter(0)\n  {line}'))
    assert found.array_bytes == 4


def loop(known: str = '', begin: int = 0, limit: int = 12, inner: str = '') -> tuple[str, ...]:
    body = f"""
%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {{
  %p = (s32[], f32[8,64]{{1,0}}) parameter(0)
  %v = f32[8,64]{{1,0}} get-tuple-element(%p), index=1
  %r = f32[8,64]{{1,0}} all-reduce(%v), {GROUPS}, to_apply=%add
{inner}
  ROOT %t = (s32[], f32[8,64]{{1,0}}) tuple(%i, %r)
}}
%condition (q: (s32[], f32[8,64])) -> pred[] {{
  %q = (s32[], f32[8,64]{{1,0}}) parameter(0)
  %n = s32[]{{:T(128)}} constant({limit})
  %c = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%c, %n), direction=LT
}}"""
    entry = f"""  %b = f32[8,64]{{1,0}} parameter(0)
  %zero = s32[]{{:T(128)}} constant({begin})
  %start = (s32[], f32[8,64]{{1,0}}) tuple(%zero, %b)
  ROOT %w = (s32[], /*index=1*/f32[8,64]{{1,0}}) while(%start), condition=%condition, body=%body{known}"""
    return entry, body


@pytest.mark.parametrize(
    ('made', 'count'),
    [
        (loop(), 12),
        (loop(begin=2), 10),
        (loop(known=', backend_config={"known_trip_count":{"n":"7"}}'), 7),
        (loop(limit=0), 0),
    ],
)
def test_the_body_of_a_loop_counts_as_often_as_it_runs(made, count):
    found = hlo.collectives(module(*made))
    assert sum(each.times for each in found) == count
    assert {(each.kind, each.dtype, each.array_bytes) for each in found} == (
        {('all-reduce', 'f32', 2048)} if count else set()
    )


def test_loops_in_loops_multiply():
    inner = '  %w = (s32[], f32[8,64]{1,0}) while(%p), condition=%few, body=%inner'
    inside = f"""
%inner (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {{
  %p = (s32[], f32[8,64]{{1,0}}) parameter(0)
  %v = f32[8,64]{{1,0}} get-tuple-element(%p), index=1
  %g = f32[32,64]{{1,0}} all-gather(%v), {GROUPS}, dimensions={{0}}
}}
%few (q: (s32[], f32[8,64])) -> pred[] {{
  %q = (s32[], f32[8,64]{{1,0}}) parameter(0)
  %n = s32[] constant(3)
  %c = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%c, %n), direction=LT
}}"""
    counts = {each.kind: each.times for each in hlo.collectives(module(*loop(inner=inner), inside))}
    assert counts == {'all-reduce': 12, 'all-gather': 36}


@pytest.mark.parametrize(
    'branches', ['true_computation=%few, false_computation=%most', 'branch_computations={%nothing, %most, %few}']
)
def test_of_a_conditional_the_branch_that_sends_most_counts_alone(branches):
    def branch(name: str, line: str) -> str:
        return f'%{name} (p: f32[8,64]) -> f32[8,64] {{\n  %p = f32[8,64]{{1,0}} parameter(0)\n  {line}\n}}'

    few = branch('few', f'ROOT %r = f32[8,64]{{1,0}} all-reduce(%p), {GROUPS}, to_apply=%add')
    most = branch('most', f'%g = f32[32,64]{{1,0}} all-gather(%p), {GROUPS}, dimensions={{0}}')
    nothing = branch('nothing', 'ROOT %big = f32[512,64]{1,0} broadcast(%p), dimensions={0,1}')
    line = f'  ROOT %c = f32[8,64]{{1,0}} conditional(%which, %b, %b, %b), {branches}'
    text = module(GIVEN + line, few, most, nothing)
    assert [(each.kind, each.times) for each in hlo.collectives(text)] == [('all-gather', 1)]
    # It reads 4 * 8 * 64 bytes and writes four times as much.
    assert hlo.memory_traffic(text) == 5 * 2048


@pytest.mark.parametrize('name', ['all-reduce-scatter.7', 'fusion.1588'])
def test_a_reduce_scatter_of_a_tpu_is_found_in_its_fusion(name):
    fused = f"""
%all-reduce-scatter.1.clone (x: f32[8,64]) -> f32[2,64] {{
  %x = f32[8,64]{{1,0}} parameter(0)
  %r = f32[8,64]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add
  ROOT %s = f32[2,64]{{1,0}} dynamic-slice(%r, %i, %j), dynamic_slice_sizes={{2,64}}
}}"""
    line = f'  ROOT %{name} = f32[2,64]{{1,0}} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1.clone'
    (found,) = hlo.collectives(module(f'{GIVEN}{line}', fused))
    assert (found.kind, found.array_bytes, found.overlapped) == ('reduce-scatter', 2048, False)


@pytest.mark.parametrize(
    ('between', 'overlapped'), [('', False), ('  %m = f32[8,64]{1,0} fusion(%b), kind=kLoop, calls=%f\n', True)]
)
def test_what_is_started_runs_beside_what_is_computed_before_its_end(between, overlapped):
    start = f'  %s = (bf16[8,64]{{1,0}}, bf16[32,64]{{1,0}}) all-gather-start(%a), {GROUPS}, dimensions={{0}}\n'
    done = '  ROOT %d = bf16[32,64]{1,0} all-gather-done(%s)'
    (found,) = hlo.collectives(module(GIVEN + start + between + done))
    assert (found.array_bytes, found.overlapped) == (4096, overlapped)


def test_fusions_that_carry_a_started_collective_on_are_not_counted_again():
    def fused(name):
        return f"""
%{name} (x: bf16[8,64]) -> bf16[32,64] {{
  %x = bf16[8,64]{{1,0}} parameter(0)
  ROOT %g = bf16[32,64]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}
}}"""

    lines = """
  %async-collective-start.1 = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%a), kind=kCustom, calls=%first
  %fusion.3 = f32[8,64]{1,0} fusion(%b), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %async-collective-done.1 = bf16[32,64]{1,0} fusion(%async-collective-start.1), kind=kCustom, calls=%last"""
    program = module(GIVEN + lines, fused('first'), fused('async_collective_fusion.2'), fused('last'))
    (found,) = hlo.collectives(program)
    assert (found.kind, found.array_bytes, found.overlapped) == ('all-gather', 4096, True)


@pytest.mark.parametrize(
    ('written', 'group'),
    [
        ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', (0, 4)),
        ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3)),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3)),
    ],
)
def test_groups_are_understood_in_every_way_of_writing(written, group):
    line = f'  ROOT %g = f32[8,64]{{1,0}} all-reduce(%b), channel_id=1, {written}, to_apply=%add'
    (found,) = hlo.collectives(module(GIVEN + line))
    assert found.group == group


def test_gradients_are_what_is_added_up_on_the_way_back():
    def line(name, dtype, where):
        return (
            f'  %{name} = {dtype}[64,64]{{1,0}} all-reduce(%{dtype}), {GROUPS}, to_apply=%add, '
            f'metadata={{op_name="jit(step)/{where}/dot"}}\n'
        )

    given = '  %f32 = f32[64,64]{1,0} parameter(0)\n  %bf16 = bf16[64,64]{1,0} parameter(1)\n'
    found = hlo.collectives(module(given + line('x', 'f32', 'transpose(jvp(Model))') + line('y', 'bf16', 'jvp(Model)')))
    assert hlo.gradient_dtypes(found) == {'f32': 16384}


@pytest.mark.parametrize('named', ['jvp()', 'transpose(jvp(Model))'])
def test_gradients_that_go_together_with_a_loss_are_told_from_it(named):
    def made(name, where):
        return f'  %{name} = f32[64]{{0}} fusion(%x), metadata={{op_name="jit(step)/{where}/dot"}}\n'

    lines = (
        made('loss', 'jvp()') + made('gradient', 'transpose(jvp(Model))') + made('while', 'transpose(jvp(Model))')
        + '  %layer = f32[64]{0} get-tuple-element(%while), index=1\n  %copy = f32[64]{0} copy(%layer)\n'
        '  %g = (f32[64]{0}, f32[64]{0}, f32[64]{0}) all-reduce(%loss, %gradient, %copy), '
        f'{GROUPS}, to_apply=%add, metadata={{op_name="jit(step)/{named}/sum"}}'
    )  # fmt: skip
    (found,) = hlo.collectives(module(lines))
    assert (found.array_bytes, found.forward_bytes) == (768, 256)
    assert hlo.gradient_dtypes([found]) == {'f32': 512}


def test_memory_traffic_leaves_out_what_stays_on_the_chip_and_what_a_slice_does_not_touch():
    fused = """
%slicing (x: f32[12,8,64], i: s32[]) -> f32[8,64] {
  %x = f32[12,8,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,8,64]{2,1,0} dynamic-slice(%x, %i, %z, %z), dynamic_slice_sizes={1,8,64}
  ROOT %y = f32[8,64]{1,0} bitcast(%s)
}
%updating (x: f32[12,8,64], u: f32[1,8,64], i: s32[]) -> f32[12,8,64] {
  %x = f32[12,8,64]{2,1,0} parameter(0)
  %u = f32[1,8,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[12,8,64]{2,1,0} dynamic-update-slice(%x, %u, %i, %z, %z)
}"""
    lines = """  %x = f32[12,8,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %a = f32[8,64]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%slicing
  %b = f32[8,64]{1,0:T(8,128)} add(%a, %a)
  %u = f32[1,8,64]{2,1,0} bitcast(%b)
  ROOT %y = f32[12,8,64]{2,1,0} fusion(%x, %u, %i), kind=kLoop, calls=%updating"""
    one = 8 * 64 * 4
    # The slice is read and stays on the chip; the sum is written; the update is read and written. Numbers: an index.
    assert hlo.memory_traffic(module(lines, fused)) == pytest.approx(4 * one, abs=16)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='ENTRY'):
        hlo.collectives('nothing')
