"""The guest's file systems stand still for the transaction, and no longer than they must."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.source import qemu_agent
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu import QemuVm
from nbdsrv.source.qemu_agent import agent_socket
from nbdsrv.source.qmp import QmpClient, open_qmp
from tests.source.guest_agent import Agent, agent
from tests.source.victims import victim
from tests.source.virtual_machine import MIB, Drive, Machine, machine

THAW, FREEZE = "guest-fsfreeze-thaw", "guest-fsfreeze-freeze"


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Machine]:
    async with machine(tmp_path, (Drive("vd0", MIB),)) as running:
        yield running


@pytest.fixture
async def inside(tmp_path: Path) -> AsyncIterator[Agent]:
    async with agent(tmp_path / "qga.sock") as listening:
        yield listening


@pytest.fixture
def vm(guest: Machine, inside: Agent, workers: Workers) -> QemuVm:
    location = f"{guest.monitor}?scratch={guest.folder}&agent={inside.path}"
    return QemuVm(location, workers)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECT_S", "FREEZE_S", "THAW_S"):
        monkeypatch.setattr(qemu_agent, name, 0.3)


@pytest.fixture
def frozen_at(monkeypatch: pytest.MonkeyPatch, inside: Agent) -> list[bool]:
    """Was the guest frozen when the transaction began?"""
    found: list[bool] = []
    execute = QmpClient.execute

    async def noting(self: QmpClient, command: str, *args: object, **named: object) -> object:
        if command == "transaction":
            found.append(inside.frozen)
        return await execute(self, command, *args, **named)

    monkeypatch.setattr(QmpClient, "execute", noting)
    return found


async def test_frozen_for_the_transaction_alone(
    vm: QemuVm, inside: Agent, frozen_at: list[bool]
) -> None:
    async with vm.freeze({}) as frozen:
        assert frozen.consistency == "filesystem"
        assert frozen.facts["agent"] == "3 file systems frozen"
        assert frozen_at == [True]
        assert not inside.frozen
    assert inside.asked == [FREEZE, THAW]


async def test_a_guest_that_refuses_is_backed_up_all_the_same(vm: QemuVm, inside: Agent) -> None:
    inside.refuse = "fsfreeze hook has failed with status 1"
    async with vm.freeze({}) as frozen:
        assert frozen.consistency == "crash"
        assert inside.refuse in frozen.facts["agent"]
    assert inside.asked == [FREEZE, THAW]


@pytest.mark.parametrize("command", ["guest-sync-delimited", FREEZE])
async def test_an_agent_that_does_not_answer(vm: QemuVm, inside: Agent, command: str) -> None:
    inside.mute.add(command)
    async with vm.freeze({}) as frozen:
        assert frozen.consistency == "crash"
        assert f"no answer to {command}" in frozen.facts["agent"]
    # Who was never told to freeze need not be thawed.
    assert inside.asked == ([] if command == "guest-sync-delimited" else [THAW])


async def test_an_agent_that_is_not_there(guest: Machine, workers: Workers) -> None:
    vm = QemuVm(f"{guest.monitor}?scratch={guest.folder}&agent={guest.folder}/none", workers)
    async with vm.freeze({}) as frozen:
        assert frozen.consistency == "crash"
        assert "none" in frozen.facts["agent"]


async def test_thawing_is_tried_again(vm: QemuVm, inside: Agent) -> None:
    inside.leave.add(THAW)
    inside.leave.add(FREEZE)
    async with vm.freeze({}) as frozen:
        # It froze, and hung up before it said so: not to be relied upon.
        assert frozen.consistency == "crash"
        assert not inside.frozen
    assert inside.asked == [FREEZE, THAW, THAW]


async def test_a_guest_that_stays_frozen_is_a_failure_to_succeed(
    vm: QemuVm, inside: Agent, guest: Machine
) -> None:
    inside.mute.add(THAW)
    async with vm.freeze({}) as frozen:
        with pytest.raises(SourceError, match="may still be frozen"):
            await frozen.succeed()
    assert await guest.checkpoints() == {"vd0-node": [frozen.disks[0].checkpoint]}
    inside.mute.clear()
    assert await vm.clean() == ["freeze of the guest's file systems"]
    assert not inside.frozen


async def test_a_guest_that_can_be_thawed_later_is(vm: QemuVm, inside: Agent) -> None:
    inside.mute.add(THAW)
    async with vm.freeze({}) as frozen:
        inside.mute.clear()
        await frozen.succeed()
        assert not inside.frozen
    assert await vm.clean() == []


async def test_a_frozen_guest_is_thawed_whatever_agent_is_wanted_now(
    inside: Agent, guest: Machine, workers: Workers
) -> None:
    location = f"{guest.monitor}?scratch={guest.folder}"
    await victim(f"{location}&agent={inside.path}", {}, 0, "transaction")
    assert inside.frozen
    without = QemuVm(f"{location}&agent=off", workers)
    inside.mute.add(THAW)
    assert "freeze of the guest's file systems" not in await without.clean()
    assert inside.frozen
    inside.mute.clear()
    assert await without.clean() == ["freeze of the guest's file systems"]
    assert not inside.frozen


async def test_thawed_when_the_transaction_fails(
    vm: QemuVm, inside: Agent, guest: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.source.qemu_graph.GRANULARITY", 12345)
    with pytest.raises(SourceError, match=r"transaction: .*[Gg]ranularity"):
        await vm.freeze({}).__aenter__()
    assert inside.asked == [FREEZE, THAW]
    assert await guest.left() == []


async def test_thawed_when_cancelled_again_and_again(
    vm: QemuVm, inside: Agent, guest: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = QmpClient.execute

    async def cancelling(self: QmpClient, command: str, *args: object, **named: object) -> object:
        if command == "transaction":
            task.cancel()
            for delay in (0.001, 0.002, 0.005, 0.01, 0.02):
                asyncio.get_running_loop().call_later(delay, task.cancel)
        return await execute(self, command, *args, **named)

    monkeypatch.setattr(QmpClient, "execute", cancelling)
    task = asyncio.create_task(vm.freeze({}).__aenter__())
    await asyncio.wait([task])
    assert task.cancelled()
    assert not inside.frozen
    assert inside.asked == [FREEZE, THAW]
    assert await guest.left() == []


async def test_a_kill_in_between_is_made_good_for(
    vm: QemuVm, inside: Agent, guest: Machine
) -> None:
    location = f"{guest.monitor}?scratch={guest.folder}&agent={inside.path}"
    await victim(location, {}, 0, "transaction")
    assert inside.frozen
    removed = await vm.clean()
    assert removed[0] == "freeze of the guest's file systems"
    assert not inside.frozen
    assert await vm.clean() == []
    assert inside.asked == [FREEZE, THAW]
    assert await guest.left() == []


async def test_the_agents_socket_is_found(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    chardev = f"socket,path={tmp_path}/a.sock,server=on,wait=off,id=agent0"
    port = "virtserialport,chardev=agent0,name=org.qemu.guest_agent.0"
    more = ("-chardev", chardev, "-device", "virtio-serial-pci", "-device", port)
    async with machine(tmp_path, (Drive("vd0", MIB),), *more) as guest:
        # No guest has opened the port: nobody would answer.
        async with QemuVm(f"{guest.monitor}?scratch={tmp_path}", workers).freeze({}) as frozen:
            assert frozen.consistency == "crash"
            assert "agent" not in frozen.facts
        execute = QmpClient.execute

        async def opened(self: QmpClient, command: str, *args: object, **named: object) -> object:
            answer = await execute(self, command, *args, **named)
            if command == "query-chardev":
                assert isinstance(answer, list)
                return [{**each, "frontend-open": True} for each in answer]
            return answer

        monkeypatch.setattr(QmpClient, "execute", opened)
        client = await open_qmp("vm", path=guest.monitor)
        assert await agent_socket(client) == f"{tmp_path}/a.sock"
        await client.close()
