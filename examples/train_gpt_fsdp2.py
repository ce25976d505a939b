"""A small transformer on characters over many processes: fully_shard (FSDP2), and if wished the clones over ranks.

python examples/train_gpt_fsdp2.py
torchrun --nproc-per-node 4 --max-restarts 3 examples/train_gpt_fsdp2.py --checkpoint run --save-every 50

Where a process dies torchrun starts all of them again: they go on from the last whole checkpoint, bit for bit.
"""

import argparse
import itertools
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from char_transformer import Transformer, batches
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

import alrao_fast as alrao
from alrao_fast.distributed import ClonesParallel


def start(device: str) -> None:
    """The process group of torchrun, or one of this process alone.

    A process that waits for another one longer than the timeout ends with an error, and torchrun starts all anew.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(dist.rendezvous("env://"))
        # After a restart torchrun's store still has the addresses of the processes that are gone.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        limit = timedelta(minutes=5)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shard(net: alrao.AlraoModel, mesh: DeviceMesh) -> None:
    """Clones over the ranks of "clones", everything else over those of "data", block by block."""
    if mesh["clones"].size() > 1:
        parallelize_module(net, mesh["clones"], {"head": ClonesParallel()})
    for block in net.backbone.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])


def save(folder: Path, net: alrao.AlraoModel, opt: alrao.AlraoAdam, step: int) -> None:
    """Keep the state after `step` steps, and then no older one."""
    model, optimizer = get_state_dict(net, opt)
    path = folder / f"step-{step}"
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)
    if dist.get_rank() == 0:
        for other in set(folder.glob("step-*")) - {path}:
            shutil.rmtree(other)


def last(folder: Path) -> int:
    """The step of the last checkpoint that is whole, the first process's view for all of them; 0 if there is none."""
    # What .metadata names was written before it.
    steps = [
        int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/.metadata")
    ]
    found = [max(steps, default=0)]
    dist.broadcast_object_list(found)
    return found[0]


def load(folder: Path, net: alrao.AlraoModel, opt: alrao.AlraoAdam, step: int) -> None:
    """Take over a checkpoint of any number of processes."""
    model, optimizer = get_state_dict(net, opt)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder / f"step-{step}")
    set_state_dict(net, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def validate(net: alrao.AlraoModel, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Bits per character over all processes."""
    net.eval()
    with torch.no_grad():
        loss = torch.stack([net(x, targets=y) for x, y in data]).mean()
    dist.all_reduce(loss)
    net.train()
    return float(loss) / dist.get_world_size() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a process")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--clones", type=int, default=6)
    parser.add_argument("--clones-over", type=int, default=1, help="ranks that share the clones")
    parser.add_argument("--checkpoint", type=Path, help="a folder to save to, and to go on from")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    start(args.device)
    try:
        train(args)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    if args.clones_over < 1 or dist.get_world_size() % args.clones_over:
        raise SystemExit(
            f"--clones-over: got {args.clones_over}, expected a divisor of the number of processes, "
            f"{dist.get_world_size()}"
        )
    sizes = dist.get_world_size() // args.clones_over, args.clones_over
    mesh = init_device_mesh(args.device, sizes, mesh_dim_names=("data", "clones"))
    raw = "\n".join(topics.values())
    alphabet = sorted(set(raw))
    number = {c: k for k, c in enumerate(alphabet)}
    text = torch.tensor([number[c] for c in raw], device=args.device)
    parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]

    torch.manual_seed(0)
    backbone = Transformer(len(alphabet), args.context, args.width, args.depth, heads=4)
    head = alrao.ClassifierClones(args.width, len(alphabet), num_clones=args.clones)
    net = alrao.AlraoModel(backbone, head).to(args.device)
    shard(net, mesh)
    # All ranks have the first one's rates, whatever their random numbers.
    opt = alrao.AlraoAdam(net, total_steps=args.steps)
    first = last(args.checkpoint) if args.checkpoint else 0
    if first:
        load(args.checkpoint, net, opt, first)

    # Ranks that share the clones see the same sequences, others their own.
    replica = mesh["data"].get_local_rank()
    seeds = (2 * replica, 2 * replica + 1)
    training, held_out = (
        batches(part, args.batch, args.context, seed) for part, seed in zip(parts, seeds)
    )
    # Without what a run that was interrupted has seen.
    steps = itertools.islice(enumerate(training, 1), first, args.steps)
    quiet = dist.get_rank() != 0
    for step, (x, y) in tqdm(steps, initial=first, total=args.steps, disable=quiet):
        opt.zero_grad()
        net(x, targets=y).backward()
        alrao.clip_grad_norm_(net, 1.0)
        opt.step()
        if args.checkpoint and (step == args.steps or step % args.save_every == 0):
            save(args.checkpoint, net, opt, step)

    with opt.averaged():
        bits = validate(net, [next(held_out) for _ in range(20)])
    posterior = [round(p, 3) for p in net.posterior().tolist()]
    if not quiet:
        print(f"validation: {bits:.3f} bits per character on {dist.get_world_size()} processes")
        print(f"posterior of the clones: {posterior}")


if __name__ == "__main__":
    main()
