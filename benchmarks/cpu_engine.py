"""Step time on CPU: Megatron-Core's own runtime under the scoped device layer, or a native loop.

``scoped``: what the trainer runs, Megatron's DistributedDataParallel, schedule, clipping and optimizer.
``native``: the same GPTModel unpatched, with torch's AdamW, one all-reduce of the flattened gradients and
torch's clipping: the least that a CPU-only engine would have to do. Decides design rule 6 (one engine if it
is within 10% of the native one). Run under torchrun, each engine in its own processes, alternating:

    torchrun --nproc-per-node 2 benchmarks/cpu_engine.py --engine scoped
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed

from megatron_sharedproj.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries

SEQ, MICRO, MICRO_BATCHES = 256, 8, 1


def native_step(model, params, optimizer, batches, group):
    flat = torch.zeros(sum(p.numel() for p in params))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for tokens, positions in batches:
            (model(tokens, positions, None, labels=tokens).mean() / len(batches)).backward()
        if torch.distributed.get_world_size(group) > 1:
            torch.cat([p.grad.reshape(-1) for p in params], out=flat)
            torch.distributed.all_reduce(flat, group=group)
            flat.div_(torch.distributed.get_world_size(group))
            for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad.copy_(piece.view_as(p))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def scoped_step(model, parallel, train, batches):
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_sharedproj.training import optimizer as optim

    wrapped = optim.wrap_data_parallel(model, parallel, train)
    optimizer = optim.build_optimizer(wrapped, parallel, train)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss

    def forward(iterator, module):
        tokens, positions = next(iterator)
        return module(tokens, positions, None, labels=tokens), lambda losses: (losses.mean(), {})

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[wrapped],
            num_microbatches=len(batches),
            seq_length=SEQ,
            micro_batch_size=MICRO,
            forward_only=False,
        )
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("scoped", "native"), required=True)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    quiet_libraries()
    if args.engine == "scoped":
        get_device().install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_sharedproj.model import build_model

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
    # Unpatched, Megatron's tracker would touch CUDA; its inference form is a no-op.
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=args.engine == "native")
    torch.manual_seed(1)
    config = ModelConfig(
        args.num_layers, args.hidden_size, args.hidden_size // 64, 2048, SEQ,
        attention_variant="qk_eq_v", activation="gelu", attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    parallel = ParallelConfig(tensor_model_parallel_size=args.tensor_model_parallel_size)
    model = build_model(config, parallel)
    ranks = parallel_state.get_data_parallel_world_size()
    positions = torch.arange(SEQ).expand(MICRO, SEQ)
    batches = [(torch.randint(0, 2048, (MICRO, SEQ)), positions) for _ in range(MICRO_BATCHES)]
    if args.engine == "scoped":
        step = scoped_step(model, parallel, TrainConfig(lr=1e-3, train_iters=1, global_batch_size=1), batches)
    else:
        params = list(model.parameters())
        optimizer = torch.optim.AdamW(params, lr=1e-3)
        step = native_step(model, params, optimizer, batches, parallel_state.get_data_parallel_group())
    for _ in range(5):
        step()
    times = []
    for _ in range(args.steps):
        torch.distributed.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    if os.environ["RANK"] == "0":
        median = statistics.median(times)
        tokens = MICRO * MICRO_BATCHES * ranks * SEQ
        print(
            f"{args.engine},{torch.distributed.get_world_size()},{args.tensor_model_parallel_size},"
            f"{args.num_layers},{args.hidden_size},{median * 1000:.1f},{tokens / median:.0f}"
        )


if __name__ == "__main__":
    main()
