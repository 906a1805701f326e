"""Averagers over libp2p: hivemind's, with the faults mended that were measured in version 1.1.12.

Each class changes the smallest piece that a fault lies in:
- a process dies with its parent (`run`);
- a stream stays open until its reader closes it, since the libp2p daemon can lose the last message of one that the
  server closes (`rpc_*`, and the reader that stops after the last part);
- a round is all or nothing: averages are gathered first, and applied only when every part of every tensor has come
  from every member (`_run_allreduce_inplace_`). A round that lost a part fails, and leaves the tensors as they were;
- all members end with the same bits (`_Runner`).
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from types import SimpleNamespace
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind's reading of rpc_* signatures knows no other

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllreduceException, AllReduceRunner
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.partition import BannedException
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2

from averaging.process import die_with_parent

HELD_OPEN_SECONDS = 10.0  # cap on how long a handler waits for its reader to close


@dataclass(frozen=True)
class Round:
    """How one averaging round ended."""

    kind: str  # "gradients" or "state"
    outcome: str  # "averaged", "failed" or "alone"
    group_size: int  # this peer included
    seconds: float  # from the wish to average until the result
    epoch: int  # the collaborative epoch it was for


class _Runner(AllReduceRunner):  # type: ignore[misc]  # hivemind is untyped
    """An all-reduce that ends with the same bits on every member.

    Stock reducers answer with the average less the sender's own part; added up again, it rounds differently on each
    member. Here they answer with the average itself. And exactly as many parts are read of a peer as it owes, then the
    stream is closed from this side.
    """

    @property
    def is_complete(self) -> bool:
        """Every member sent every part, and every part came back."""
        return self.tensor_part_container.failed_size == 0 and not self.banned_senders

    def _get_peer_stub(self, peer: PeerID) -> Any:
        expected = self.tensor_part_container.num_parts_by_peer[self.ordered_peer_ids.index(peer)]
        stub = super()._get_peer_stub(peer)

        async def first_parts(inputs: AsyncIterator[averaging_pb2.AveragingData]) -> AsyncIterator[Any]:
            return _take(await stub.rpc_aggregate_part(inputs), expected)

        return SimpleNamespace(rpc_aggregate_part=first_parts)

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        if peer_id != self.peer_id:
            await super()._communicate_with_peer(peer_id)
            return
        sender, member = self.sender_peer_ids.index(peer_id), self.ordered_peer_ids.index(peer_id)
        for index, part in enumerate(self.parts_for_local_averaging):
            average = await self.tensor_part_reducer.accumulate_part(sender, index, part, weight=self.weight)
            self.tensor_part_container.register_processed_part(member, index, average)

    async def _accumulate_parts_streaming(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sender_index: int
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        received, run = 0, partial(asyncio.get_running_loop().run_in_executor, None)
        try:
            async for message in stream:
                part = await run(deserialize_torch_tensor, message.tensor_part)
                average = await self.tensor_part_reducer.accumulate_part(
                    sender_index, received, part, weight=message.weight)
                received += 1
                answer = await run(serialize_torch_tensor, average, message.tensor_part.compression)
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=answer)
        except BannedException:
            pass  # given up meanwhile: nobody waits for the rest
        finally:
            if received != self.tensor_part_reducer.num_parts:
                await self._ban_sender(self.sender_peer_ids[sender_index])


async def _take(stream: AsyncIterator[Any], count: int) -> AsyncIterator[Any]:
    taken = 0
    try:
        async for message in stream:
            yield message
            taken += 1
            if taken == count:
                break
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


class Averager(DecentralizedAverager):  # type: ignore[misc]  # hivemind is untyped
    """A DecentralizedAverager that dies with its parent, loses no message, and averages all or nothing."""

    def run(self) -> None:
        """The averager process's main."""
        die_with_parent(self._parent_pid)
        super().run()

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """As hivemind's, held open."""
        async for message in super().rpc_join_group(request, context):
            yield message
        await asyncio.sleep(HELD_OPEN_SECONDS)  # cancelled as soon as the follower closes

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """As hivemind's, held open."""
        async for message in super().rpc_aggregate_part(stream, context):
            yield message
        await asyncio.sleep(HELD_OPEN_SECONDS)  # cancelled as soon as the sender closes

    async def _run_allreduce_inplace_(self, tensors: Sequence[torch.Tensor], group_info: GroupInfo,
                                      group_id: bytes | None = None, **kwargs: Any) -> None:
        rows = [tensor.contiguous() for tensor in tensors]  # stock can cut no other layout into parts
        runner = _Runner(p2p=self._p2p, servicer_type=type(self), prefix=self.prefix, tensors=rows,
                         group_id=group_id or group_info.group_id, ordered_peer_ids=group_info.peer_ids, **kwargs)
        self._running_groups[runner.group_id].set_result(runner)
        averages = [average async for average in runner]
        if not runner.is_complete:
            raise AllreduceException("a member was lost during the round: nothing was averaged")
        for tensor, average in zip(tensors, averages, strict=True):
            tensor.copy_(average)

    def kill_process(self) -> None:
        """End the averager's process at once; nothing of a round is applied."""
        if self.is_alive() and self._parent_pid == os.getpid():
            self.kill()
            self.join()


class GradAverager(Averager, GradientAverager):  # type: ignore[misc]  # hivemind is untyped
    """hivemind's GradientAverager that weighs every micro-batch by its samples, and adds it up in one call."""

    _anchor_batch_size: int | None

    @torch.no_grad()
    def accumulate_grads_(self, batch_size: int) -> None:
        """Add the parameters' gradients, means over `batch_size` samples, to what this epoch has gathered."""
        self._anchor_batch_size = self._anchor_batch_size or batch_size
        self.local_samples_accumulated += batch_size
        self.local_times_accumulated += 1
        torch._foreach_add_(list(self._grad_accumulators()), list(self._grads_from_parameters()),
                            alpha=batch_size / self._anchor_batch_size)

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        """Put the sample-weighted mean of the accumulated gradients where the next round averages them."""
        # batch i counts b_i / b_0; stock divides by the number of batches, the mean only where all are of one size
        scale = self._anchor_batch_size / self.local_samples_accumulated if self.local_samples_accumulated else 0.0
        with self.get_tensors() as averaged:
            for accumulated, mean in zip(self._grad_accumulators(), averaged, strict=True):
                mean.copy_(accumulated, non_blocking=True).mul_(scale)


class StateAverager(Averager, TrainingStateAverager):  # type: ignore[misc]  # hivemind is untyped
    """hivemind's TrainingStateAverager that reports how its rounds ended and shares no half-made step."""

    def __init__(self, *, on_round: Callable[[Round], None], **kwargs: Any) -> None:
        self._on_round = on_round
        self.current_round: StepControl | None = None
        super().__init__(**kwargs)

    def _do(self, wait_for_trigger: Any, optimizer_step: bool, zero_grad: bool, averaging_round: bool,
            averaging_control: StepControl | None, *args: Any, timeout: float | None = None, **kwargs: Any) -> None:
        if averaging_round:
            if averaging_control is None or averaging_control.triggered or averaging_control.done():
                averaging_control = self.schedule_step(gather=self.local_epoch, timeout=timeout)
            self.current_round = averaging_control
            self._report_when_done(averaging_control)
        super()._do(wait_for_trigger, optimizer_step, zero_grad, averaging_round, averaging_control, *args,
                    timeout=timeout, **kwargs)

    def _report_when_done(self, control: StepControl) -> None:
        started, epoch = monotonic(), self.local_epoch

        def report(done: StepControl) -> None:
            failed = done.cancelled() or done.exception() is not None
            size = 1 if failed else len(done.result())
            self._on_round(Round("state", "failed" if failed else "averaged", size, monotonic() - started, epoch))

        control.add_done_callback(report)

    def get_current_state(self) -> Any:
        """What a newcomer downloads; never read in the middle of an optimiser step."""
        with self.lock_optimizer:
            return super().get_current_state()
