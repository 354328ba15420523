"""Train a model: ``torchrun --nproc-per-node N -m megatron_sharedproj.pretrain [flags]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj import distributed, formulas
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.checkpointing.selection import Choice, agree, choose
from megatron_sharedproj.command_line import print_error
from megatron_sharedproj.config import ModelConfig, RunConfig, to_dict, write_json
from megatron_sharedproj.data.datasets import build_datasets, check_document_ends, resolve_blends
from megatron_sharedproj.data.fingerprint import check_same_data, fingerprint
from megatron_sharedproj.data.padded import real_token_share
from megatron_sharedproj.data.tokenizers import build_tokenizer
from megatron_sharedproj.device import Device, get_device
from megatron_sharedproj.layout import describe_layout, recompute_note
from megatron_sharedproj.matching import describe_match
from megatron_sharedproj.ops import paths
from megatron_sharedproj.quiet import quiet_libraries
from megatron_sharedproj.validation import check_device, check_distillation, check_folders


def find_checkpoint(config: RunConfig) -> Choice | None:
    """The checkpoint that a run starts from, checked against the run's model.

    A checkpoint in ``--save`` wins over ``--load``: a restarted run goes on where it was.

    Raises:
        ValueError: if ``--load`` has none, or it is damaged, or of another variant or shape.
    """
    options = config.checkpoint
    save, load, verify = options.save, options.load, not options.no_verify_integrity
    if save and files.has_checkpoint(save):
        choice = choose(save, "--save", fallback=options.load_fallback, verify=verify)
    elif load and not (save and Path(load).resolve() == Path(save).resolve()):
        choice = choose(load, fallback=options.load_fallback, verify=verify)
    else:
        return None
    check_checkpoint(config, choice)
    return choice


def check_checkpoint(config: RunConfig, choice: Choice) -> None:
    """Whether a run can start from a checkpoint.

    Raises:
        ValueError: naming the flag that does not fit.
    """
    folder, own = choice.folder, choice.flag == "--save"
    saved = files.checkpoint_config(folder)
    files.check_same_model(config.model, saved.model, folder, choice.flag)
    state = files.train_state(folder)
    files.check_engine(folder, state)
    done = 0 if config.checkpoint.finetune and not own else state["iteration"]
    if done > config.train.train_iters:
        raise ValueError(
            f"--train-iters {config.train.train_iters}: the checkpoint in {folder.parent} is at iteration "
            f"{done} already; give more iterations, or another --save folder"
        )
    now, then = config.train.weight_decay_on_all, saved.train.weight_decay_on_all
    keeps_optimizer = not (config.checkpoint.no_load_optim or (config.checkpoint.finetune and not own))
    if now != then and keeps_optimizer:
        given, missing = ("given", "trained without it") if now else ("not given", "trained with it")
        raise ValueError(
            f"--weight-decay-on-all: {given}, but the checkpoint in {folder} was {missing}, and optimizer "
            "state is grouped by it; do as the checkpoint did, or add --no-load-optim"
        )
    protocol, before = config.data.data_protocol, saved.data.data_protocol
    if protocol != before and (own or not config.checkpoint.finetune):
        raise ValueError(
            f"--data-protocol {protocol}: the checkpoint in {folder} was trained on {before} data, and its "
            f"data position counts their rows; use {before}, or --finetune into another --save folder"
        )
    if own:
        # The run's own checkpoint: --finetune was about the start, not about a restart.
        config.checkpoint.finetune = False


def check_data(config: RunConfig, choice: Choice, blends: list[Any]) -> None:
    """Refuse to resume with other training data than the checkpoint's. Raises ValueError."""
    options = config.checkpoint
    if not (options.finetune or options.override_data_fingerprint):
        saved = files.train_state(choice.folder).get("data_fingerprint")
        if saved:
            check_same_data(saved, fingerprint(config.data, config.train, blends), choice.folder)


def teacher_model(config: RunConfig) -> ModelConfig | None:
    """The shape of the run's teacher, if it has one. Raises ValueError as check_distillation does."""
    choice = check_distillation(config)
    return files.checkpoint_config(choice.folder).model if choice else None


def check_teacher_tokenizer(config: RunConfig, tokenizer: Any) -> str:
    """Refuse a teacher of another tokenizer; a line where its tokenizer is not there any more.

    Raises:
        ValueError: naming the flag and both tokenizers.
    """
    choice = check_distillation(config)
    if choice is None:
        return ""
    data = files.checkpoint_config(choice.folder).data
    try:
        theirs = build_tokenizer(
            data.tokenizer_type, data.tokenizer_model or None, data.vocab_file or None,
            data.merge_file or None, data.vocab_size or None,
        )  # fmt: skip
    except ValueError as error:
        return f"note: the teacher's tokenizer cannot be compared with this run's: {error}"
    if (theirs.sha256, theirs.eod) != (tokenizer.sha256, tokenizer.eod):
        raise ValueError(
            f"--distill-teacher {config.distill.distill_teacher}: was trained with another tokenizer "
            f"({theirs.describe()}) than this run's ({tokenizer.describe()}); use its own"
        )
    return ""


def attention_path(config: RunConfig, device: Device) -> paths.Path:
    """The attention path of the run's training steps.

    Raises:
        ValueError: if ``--require-kernel`` is given and the compiled kernel cannot run them.
    """
    return paths.choose(
        paths.Request(
            device=device.type,
            dtype=getattr(torch, config.train.params_dtype),
            head_size=config.model.kv_channels,
            tied=config.model.attends_one_tensor,
            queries=config.train.seq_length,
            keys=config.train.seq_length,
            training=True,
            dropout=config.model.attention_dropout > 0,
            capability=device.capability,
        ),
        required=config.train.require_kernel,
    )


def prepare(args: Any) -> tuple[RunConfig, Any, list[Any], Device, Choice | None]:
    """Everything that can be wrong with the flags, checked before any process group exists.

    Raises:
        ValueError: one line naming the flag, its value and the remedy.
    """
    device = get_device()
    tokenizer = build_tokenizer(
        args.tokenizer_type, args.tokenizer_model or None, args.vocab_file or None, args.merge_file or None,
        args.vocab_size or None,
    )  # fmt: skip
    world = distributed.world_size()
    config = run_config(args, tokenizer.vocab_size, world)
    check_teacher_tokenizer(config, tokenizer)
    check_device(config, device, world // config.parallel.ranks_per_replica, teacher_model(config))
    attention_path(config, device)
    checkpoint = find_checkpoint(config)
    blends = resolve_blends(
        config.data,
        tokenizer.vocab_size,
        validate=config.train.eval_iters > 0,
        tokenizer=(config.data.tokenizer_type, tokenizer.sha256),
    )
    if checkpoint is not None:
        check_data(config, checkpoint, blends)
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(config.data, name):
            check_document_ends(blends, tokenizer.eod, "--" + name.replace("_", "-"))
    if os.environ.get("RANK", "0") == "0":
        check_folders(config)
    return config, tokenizer, blends, device, checkpoint


def build_trainer(
    config: RunConfig, tokenizer: Any, blends: list[Any], device: Device, choice: Choice | None
) -> Any:
    """Model, optimizer, data and state of a run, ready to train."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    from megatron_sharedproj.checkpointing.sharded import load_checkpoint
    from megatron_sharedproj.model import build_chunks
    from megatron_sharedproj.training import optimizer as optim
    from megatron_sharedproj.training.log import TrainingLog
    from megatron_sharedproj.training.loop import Trainer
    from megatron_sharedproj.training.signals import StopSignals

    train = config.train
    choice = _verified(config, choice, blends)
    checkpoint = choice.folder if choice else None
    local = device.current()
    world = torch.distributed.get_world_size()
    log = TrainingLog(
        config,
        world_size=world,
        device_name=device.describe(),
        enabled=torch.distributed.get_rank() == world - 1,
    )
    log.message(f"attention variant: {config.model.describe_attention()}")
    if train.match_parameters_of:
        log.message(describe_match(config.model, train.match_parameters_of, train.width_before_match))
    paths.require_kernel(train.require_kernel)
    log.message(str(attention_path(config, device)))
    counts = formulas.parameters(config.model)
    ranks = parallel_state.get_data_parallel_world_size()
    log.message(
        f"{counts['total']:,} parameters ({counts['attention']:,} in attention), "
        f"{formulas.kv_cache_bytes_per_token(config.model):,} bytes of cache per token at 2 bytes per element"
    )
    log.message(
        f"{world} process(es), {describe_layout(config.parallel)}, data parallel {ranks}, "
        f"{device.describe()}; {check_device(config, device, ranks, teacher_model(config))}"
    )
    if products := device.products():
        log.message(products)
    note = recompute_note(config, fused=device.has_fused_kernels)
    if note:
        log.message(note)
    built = build_chunks(
        config.model,
        config.parallel,
        dtype=getattr(torch, train.params_dtype),
        deterministic_mode=train.deterministic_mode,
    )
    model_config = built[0].config  # the chunks share it
    model_config.finalize_model_grads_func = finalize_model_grads
    chunks = optim.wrap_data_parallel([chunk.to(local) for chunk in built], config.parallel, train)
    optimizer = optim.build_optimizer(chunks, config.parallel, train)
    model_config.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        # Micro batches before the last one only accumulate.
        no_sync = [chunk.no_sync for chunk in chunks]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    schedule = optim.build_schedule(optimizer, train)
    teacher = _build_teacher(config, tokenizer, device, [chunk.module for chunk in chunks], log)
    distributed.seed_all(train.seed, data_parallel_offset=True)

    resumed = checkpoint is not None and not config.checkpoint.finetune
    done = files.train_state(checkpoint) if checkpoint is not None and resumed else {}
    # Flags unchanged, this is train_iters global batches; a run that changed its batch has used others.
    consumed = done.get("consumed_samples", 0)
    evaluated = train.eval_iters * train.global_batch_size
    sizes = (
        train.samples_after(train.train_iters - done.get("iteration", 0), consumed),
        evaluated,
        evaluated if config.data.test_data_path else 0,
    )
    with StopSignals() as signals:  # half an index would be read as a whole one
        train_data, valid_data, test_data = build_datasets(config.data, train, tokenizer, blends, sizes)
        signals.raise_if_any(local)
    trainer = Trainer(
        config=config, device=device, torch_device=local, chunks=chunks, optimizer=optimizer,
        schedule=schedule, train_data=train_data, valid_data=valid_data, test_data=test_data, log=log,
        boundary=tokenizer.eod if config.data.reset_attention_mask else None, teacher=teacher,
        data_fingerprint=fingerprint(config.data, train, blends) if distributed.is_rank_0() else {},
    )  # fmt: skip
    if choice is not None:
        for note in choice.notes:
            log.message(note)
        trainer.saver.damaged.update(choice.skipped)
        _resume(trainer, choice.folder, load_checkpoint)
    # Only now, when all of it stands, is anything written to the run folder.
    if config.checkpoint.save and distributed.is_rank_0():
        Path(config.checkpoint.save).mkdir(parents=True, exist_ok=True)
        write_json(Path(config.checkpoint.save) / files.RUN_CONFIG, to_dict(config))
        if choice is not None and choice.skipped and choice.flag == "--save":
            # What is damaged stays, but is no longer latest: it may be replaced, even by a killed save.
            files.write_tracker(config.checkpoint.save, trainer.iteration)
    log.open(trainer.iteration)
    _report_protocol(trainer, tokenizer.eod)
    return trainer


def _build_teacher(config: RunConfig, tokenizer: Any, device: Device, student: list[Any], log: Any) -> Any:
    """The run's teacher, or None; it takes no part in what is optimised or saved."""
    choice = check_distillation(config)
    if choice is None:
        return None
    from megatron_sharedproj.training.distillation import build_teacher

    model, distill = files.checkpoint_config(choice.folder).model, config.distill
    if note := check_teacher_tokenizer(config, tokenizer):
        log.message(note)
    log.message(
        f"teacher: {choice.folder}, {formulas.parameters(model)['total']:,} parameters, "
        f"{model.describe_attention()}; loss: {1 - distill.distill_alpha:g} CE + {distill.distill_alpha:g} "
        f"T^2 KL(teacher || student), T {distill.distill_temperature:g}"
    )
    return build_teacher(config, choice, model, device, student)


def _verified(config: RunConfig, choice: Choice | None, blends: list[Any]) -> Choice | None:
    """The checkpoint after all ranks have read it; with --load-fallback perhaps another one."""
    if choice is None:
        return None
    options = config.checkpoint
    whole = agree(choice, fallback=options.load_fallback, verify=not options.no_verify_integrity)
    if whole.folder != choice.folder:
        check_checkpoint(config, whole)
        check_data(config, whole, blends)
    return whole


def _report_protocol(trainer: Any, eod: int) -> None:
    data, log = trainer.config.data, trainer.log
    if data.data_protocol == "packed":
        names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        flags = [f"--{name.replace('_', '-')}" for name in names if getattr(data, name)]
        at_ends = f"; {', '.join(flags)} at token {eod}" if flags else ""
        log.message(f"data protocol: packed (documents back to back, every token real{at_ends})")
        return
    length = trainer.config.train.seq_length
    log.message(
        f"data protocol: padded (the paper's: a document per row of {length} tokens, cut, "
        f"or filled with token {eod}, which is scored); losses compare with padded ones only"
    )
    if log.enabled:
        splits = {"train": trainer.train_data, "validation": trainer.valid_data, "test": trainer.test_data}
        shares = {
            f"{name}_real_token_share": real_token_share(d) for name, d in splits.items() if d is not None
        }
        log.evaluation("data", trainer.iteration, shares)


def _resume(trainer: Any, folder: Path, load_checkpoint: Any) -> None:
    options = trainer.config.checkpoint
    fresh = options.finetune
    with_optimizer = not (fresh or options.no_load_optim)
    state, same_streams = load_checkpoint(
        folder,
        trainer.device,
        model=trainer.bare_model,
        optimizer=trainer.optimizer if with_optimizer else None,
        load_rng=not (fresh or options.no_load_rng),
        verify=False,  # done: _verified
    )
    if not with_optimizer:
        trainer.optimizer.reload_model_params()  # the fp32 master weights of a bf16 or fp16 run
    if fresh:
        # An import's own origin; a folder's name alone says little on another machine.
        trainer.origin = state.get("imported_from") or f"checkpoint {folder.parent.name}/{folder.name}"
        trainer.log.message(f"weights from {folder}; step, data, optimizer and RNG start anew")
        return
    trainer.iteration, trainer.consumed_samples = state["iteration"], state["consumed_samples"]
    trainer.origin = state.get("started_from") or state.get("imported_from", "")
    if options.save and Path(options.save).resolve() == folder.parent.resolve():
        trainer.last_saved = trainer.iteration
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.bad_steps_in_a_row = state.get("bad_steps_in_a_row", 0)
    if "log" in state:
        trainer.log.load_state(state["log"])
    if with_optimizer:
        _apply_adam_flags(trainer)
    if not same_streams:
        # Otherwise dropout would repeat the masks of step 0.
        distributed.seed_all(trainer.config.train.seed + trainer.iteration, data_parallel_offset=True)
        trainer.log.message("note: other ranks than the checkpoint's, or --no-load-rng: new random streams")
    same_data = "data_fingerprint" in state and not options.override_data_fingerprint
    changed = files.changed_training(files.checkpoint_config(folder), trainer.config, same_data=same_data)
    if changed:
        trainer.log.message(
            f"note: changed since the checkpoint: {'; '.join(changed)}; learning rate and data order follow "
            "the new values from here on"
        )
    trainer.log.message(
        f"resumed from {folder}: iteration {trainer.iteration}, {trainer.consumed_samples} samples"
    )


def _apply_adam_flags(trainer: Any) -> None:
    # A loaded optimizer has the checkpoint's hyperparameters; flags of this start win, as for the schedule.
    from megatron_sharedproj.training.optimizer import use_fused_update

    train = trainer.config.train
    for group in trainer.optimizer.param_groups:
        group["betas"], group["eps"] = (train.adam_beta1, train.adam_beta2), train.adam_eps
    use_fused_update(trainer.optimizer)


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit code: 0 done; 2 a mistake in the flags or a damaged checkpoint; 3 a checkpoint could not be
        written (disk full; the previous one is as it was); 4 the loss or gradient stayed NaN or infinite;
        5 another rank ended or does not answer; 128 + n stopped by signal n, with a checkpoint if training
        had begun. torchrun itself exits with 1 for any of them but 0.
    """
    quiet_libraries()
    args = build_parser().parse_args(argv)
    try:
        if args.simulate_world_size is not None:
            from megatron_sharedproj.dry_run import dry_run

            dry_run(args, build=True)
            return 0
        prepared = prepare(args)
    except ValueError as error:
        print_error(error)
        return 2
    if args.check_only:
        return 0
    try:
        return _train(prepared)
    except KeyboardInterrupt:
        print_error("interrupted; what was saved before is as it was")
        return 128 + signal.SIGINT


def _train(prepared: tuple[RunConfig, Any, list[Any], Device, Choice | None]) -> int:
    from megatron_sharedproj.checkpointing.saver import SaveError
    from megatron_sharedproj.training.bad_steps import BadStepsError
    from megatron_sharedproj.training.signals import Stopped

    trainer = None
    try:
        distributed.initialize_for(prepared[0], prepared[3])
        trainer = build_trainer(*prepared)
        code = trainer.train()
        trainer.log.close()
    except Stopped as stopped:
        print_error(f"stopped by a signal before the first step ({stopped})")
        return 128 + stopped.number
    except (ValueError, RuntimeError) as error:
        if not _expected(error):
            if torch.distributed.is_initialized() and distributed.is_lost_connection(error):
                _report_lost(trainer, error)
                return 5
            raise
        print_error(error)
        return 3 if isinstance(error, SaveError) else 4 if isinstance(error, BadStepsError) else 2
    distributed.finalize()
    return code


def _report_lost(trainer: Any, error: Exception) -> None:
    lost = distributed.lost_ranks()
    ranks = torch.distributed.get_world_size()
    first = min((rank for rank in range(ranks) if rank not in lost), default=0)
    if torch.distributed.get_rank() != first:
        return
    reason = (str(error).splitlines() or [""])[0]
    who = (
        f"rank {', '.join(map(str, lost))} ended or does not answer"
        if lost
        else f"a collective failed: {reason}"
    )
    at = f" at iteration {trainer.iteration + 1}" if trainer is not None else " before the first step"
    saved = trainer.last_saved if trainer is not None else -1
    remedy = (
        f"the last checkpoint is iteration {saved}" if saved >= 0 else "no checkpoint of this run is saved"
    )
    # Not print_error: it speaks for rank 0, which may be the one.
    print(f"error: {who}{at}; {remedy}; start again to resume", file=sys.stderr, flush=True)


def _expected(error: Exception) -> bool:
    # Our own messages name a flag, the loss or a checkpoint; anything else is a bug and keeps its traceback.
    return str(error).startswith(("--", "loss is", "checkpoint "))


if __name__ == "__main__":
    sys.exit(main())
