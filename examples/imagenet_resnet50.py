"""Train ResNet-50 on ImageNet, or on any ImageFolder tree, with compressed communication.

Without ``--data`` it trains on a small set of real images that comes with scikit-learn, and needs no GPU:

    mpirun -np 2 python examples/imagenet_resnet50.py --compare

After the Qsparse-local-SGD paper (arXiv 1906.02367; docs/papers.md says what differs), on 8 GPUs:

    mpirun -np 8 python examples/imagenet_resnet50.py --data /path/to/imagenet --output runs/paper

Other settings come together in recipes (examples/recipes), single ones from the command line:

    mpirun -np 8 python examples/imagenet_resnet50.py --data /path/to/imagenet --recipe short --sync-every 8

``--data`` names a directory with ``train/<class>/*`` and ``val/<class>/*``, or with tar shards in ``train`` and
``val`` (examples/imagenet_shards.py). An interrupted run goes on, bit for bit, with the same command.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import horovod
import horovod.torch as hvd
import torch
import torch.nn.functional as F
from imagenet_data import Augmented, EpochSampler, Images, Transforms, loader, open_images
from imagenet_epochs import Epoch, Times, describe, describe_model, summary
from imagenet_model import MovingAverage, Statistics, make_model, on_device
from imagenet_optimizer import lr_factor, make_steps
from imagenet_options import (
    PLAIN_HOROVOD,
    Method,
    as_recipe,
    chosen_method,
    parse_arguments,
    run_name,
    settings_in_use,
    settings_of_a_run,
)
from imagenet_validation import evaluate, report_unreadable, validate, validation_batches
from ranks import device, fail, on_all_ranks, progress, say, use_device
from resumable import Resumable
from rich.console import Console
from run_directory import RunDirectory

from hvd_compress import NonFiniteError


def main() -> None:
    """Train once, or with ``--compare`` twice, and report; or validate."""
    hvd.init()
    args = parse_arguments(__doc__)
    use_device()
    if args.data is None:
        from embedded_images import write_digits  # imports scikit-learn, which takes a second

        args.data = args.output / "digits"
        say(f"No ImageNet was given (--data): training on scikit-learn's handwritten digits, in {args.data}.")
        on_all_ranks(lambda: write_digits(args.data) if hvd.rank() == 0 else None)
    images = on_all_ranks(lambda: open_images(args.data))
    if args.evaluate is not None:
        evaluate(args, images)
        return
    methods = [chosen_method(args), PLAIN_HOROVOD] if args.compare else [chosen_method(args)]
    say(f"{hvd.size()} ranks, {torch.get_num_threads()} threads each, {device()}; settings: {settings_in_use(args)}")
    run = on_all_ranks(lambda: RunDirectory(args.output))

    curves: list[list[Epoch]] = []
    for method in methods:
        curves.append(train(method, args, images, run, [epoch for curve in curves for epoch in curve]))

    if hvd.rank() == 0:
        # mpirun shows each rank a terminal, even when all is written to a file: no colours, then.
        Console(force_terminal=False).print(summary(args.arch, [curve[-1] for curve in curves]))
        say(f"Metrics: {args.output / 'metrics.jsonl'}; hvd-compress report {args.output} draws them")
        if args.compare:
            from hvd_compress.report import Run, draw  # takes seconds

            picture = args.output / "accuracy-vs-megabytes.png"
            draw([Run.of(asdict(epoch) for epoch in curve) for curve in curves], "megabytes", "accuracy", picture)
            say(f"Curve:   {picture}")


def train(
    method: Method, args: argparse.Namespace, images: Images, run: RunDirectory, before: list[Epoch]
) -> list[Epoch]:
    """One run, from its seed or its last checkpoint to its last epoch.

    Args:
        method: how the ranks agree.
        args: all other settings.
        images: to train and to validate with.
        run: where its results go.
        before: epochs of other runs in the same directory.
    """
    torch.manual_seed(args.seed)
    model = make_model(args, len(images.training.classes)).to(device())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    # One code for each size of images: with a flexible one, a run that goes on would compute by another.
    forward = torch.compile(model, dynamic=False) if args.compile else model
    scaler = torch.amp.GradScaler(device().type, enabled=args.amp == "fp16")

    transforms = Transforms(args)
    sampler = EpochSampler(images.training, hvd.rank(), hvd.size(), seed=args.seed, batch_size=args.batch_size)
    augmented = Augmented(images.training, transforms, args.seed)
    batches = loader(augmented, args.workers, sampler=sampler, batch_size=args.batch_size // args.accumulate)
    val_batches = validation_batches(args, images)
    steps = min(sampler.batches, args.limit_train_batches or sampler.batches)
    if steps == 0:
        fail(f"{len(images.training)} images are too few for {hvd.size()} ranks of --batch-size {args.batch_size}")

    taking = make_steps(method, model, args, scaler, steps)
    optimizer, ledger = taking.optimizer, taking.ledger
    statistics, average = Statistics(model, ledger), MovingAverage(model, args.ema)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor((step + 1) / steps, args))
    resumable = Resumable(
        args.checkpoint,
        {
            "model": model,
            "optimizer": optimizer,
            "schedule": schedule,
            "books": taking.books,
            "scaler": scaler,
            "average": average,
        },
        {**settings_of_a_run(args), "images": len(images.training), "classes": len(images.training.classes)},
        save_every=args.checkpoint_every,
        ask_every=method.sync_every,
        afresh=args.resume == "never",
    )
    done = resumable.load() or {"epoch": 1, "step": 0, "loss": 0.0, "seconds": 0.0, "curve": []}
    curve = [Epoch(**record) for record in done["curve"]]
    on_all_ranks(lambda: run.write("config.yaml", heading() + as_recipe(args)))
    name = run_name(method, args)
    say(describe_model(name, args))
    run.open_board(name, (done["epoch"] - 1) * steps + done["step"])
    start = time.perf_counter() - done["seconds"]

    def reached_so_far(epoch: int, step: int, loss: torch.Tensor | float) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        return {"epoch": epoch, "step": step, "loss": loss, "seconds": seconds, "curve": [asdict(e) for e in curve]}

    def agreed(step: int) -> None:
        """All ranks have the same weights now, after so many steps."""
        if args.batch_norm == "averaged":
            statistics.average()
        average.update(step)

    for epoch in range(done["epoch"], args.epochs + 1):
        first, total_loss = (done["step"], done["loss"]) if epoch == done["epoch"] else (0, 0.0)
        total_loss = torch.as_tensor(total_loss, device=device())
        model.train()
        sampler.begin(epoch, skip=first)
        times = Times(ledger)
        incoming = times.waiting_for(
            on_device(islice(batches, (steps - first) * args.accumulate), args.channels_last)
        )
        with progress(f"{name}, epoch {epoch}/{args.epochs}", steps, first) as bar:
            for step in range(first + 1, steps + 1):
                optimizer.zero_grad()
                for batch in islice(incoming, args.accumulate):
                    with autocast(args):
                        outputs = forward(batch.images)
                        loss = F.cross_entropy(outputs, batch.labels, label_smoothing=args.label_smoothing)
                    scaler.scale(loss / args.accumulate).backward()
                    total_loss += loss.detach() / args.accumulate
                if taking.take():
                    agreed((epoch - 1) * steps + step)
                schedule.step()
                if bar.update():  # only when it has been drawn: to read the loss waits for the GPU
                    lr, sent = schedule.get_last_lr()[0], ledger.total.sent / 1e6
                    bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.4f}, {sent:.1f} MB sent")
                    values = {"loss": loss.item(), "lr": lr, "megabytes_sent": sent, **times.spent(args.workers)}
                    run.plot((epoch - 1) * steps + step, "step", values)
                # The validation counts as a step, it may bring an exchange.
                resumable.after_step(
                    (epoch - 1) * (steps + 1) + step,
                    (epoch - 1) * steps + step,
                    partial(reached_so_far, epoch, step, total_loss),
                )
        if taking.agree():
            agreed(epoch * steps)
        spent = times.spent(args.workers)
        train_loss = mean_over_ranks(total_loss / steps)
        if not math.isfinite(train_loss):
            fail(f"the loss became {train_loss}: try a smaller --lr or a longer --warmup-epochs")
        with average.in_place(), statistics.averaged():
            found = validate(model, val_batches, args)
            weights = {key: tensor.cpu().clone() for key, tensor in model.state_dict().items()}
        traffic = ledger.total
        unreadable = report_unreadable([*times.problems, *found.problems], run)
        reached = Epoch(
            run=name,
            epoch=epoch,
            train_loss=train_loss,
            val_loss=found.loss / len(images.validation),
            accuracy=found.correct / len(images.validation),
            accuracy_top5=found.correct_top5 / len(images.validation),
            megabytes_sent=traffic.sent / 1e6,
            ratio_to_fp32=traffic.ratio if traffic.sent else None,
            exchanges=ledger.exchanges,
            seconds=time.perf_counter() - start,
            lr=float(schedule.get_last_lr()[0]),
            **spent,
            unreadable=unreadable,
            ranks=hvd.size(),
        )
        is_best = all(reached.accuracy > earlier.accuracy for earlier in curve)
        curve.append(reached)
        records = [asdict(e) for e in before + curve]
        about = {"arch": args.arch, "classes": images.training.classes, "epoch": epoch, "accuracy": reached.accuracy}
        content = {"model": weights, **about} if args.checkpoint else None
        on_all_ranks(partial(run.write_epoch, records, ledger, content, is_best=is_best))
        run.plot(epoch * steps, "epoch", records[-1])
        say(describe(reached, args))
        # At the end there is nothing to be interrupted.
        keep = resumable.after_epoch if epoch < args.epochs else resumable.save
        keep(epoch * (steps + 1), reached_so_far(epoch + 1, 0, 0.0))
    run.close_board()
    return curve


def autocast(args: argparse.Namespace) -> torch.autocast:
    """A context of 16-bit computations, if so wished."""
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    return torch.autocast(device().type, dtype=dtype, enabled=args.amp != "none")


def mean_over_ranks(value: torch.Tensor) -> float:
    """The same on all ranks."""
    return hvd.allreduce(value, name="mean", op=hvd.Average).item()


def heading() -> str:
    """Comments for config.yaml: what the run ran on."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Horovod {horovod.__version__}"
    return (
        f"# {' '.join(sys.argv)}\n"
        f"# {hvd.size()} ranks, {hvd.local_size()} of them on {platform.node()}, {device()}; {versions}\n"
    )


if __name__ == "__main__":
    try:
        main()
    except NonFiniteError as error:  # raised by every rank
        fail(str(error))
