"""When a run's state is written: begun at the end of a step, given its name when all ranks have written their part.

At most one checkpoint is under way. It holds the values of the moment at which it was begun; training goes on.
"""

from collections.abc import Callable
from contextlib import suppress

from megatron_coreward.checkpoint import inputs, store
from megatron_coreward.checkpoint.store import TrainerState
from megatron_coreward.cluster.watchdog import WorkerDied
from megatron_coreward.cluster.worker_group import Workers
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError, environment_problem
from megatron_coreward.telemetry import label_history


class CheckpointWriter:
    def __init__(
        self,
        config: RunConfig,
        actors: Workers,
        *,
        on_complete: Callable[[int], None] = lambda step: None,
        labels: Callable[[int], bytes] | None = None,
        last_step: int = 0,
    ) -> None:
        """Args:
        on_complete: called with the step of every checkpoint that is complete.
        labels: the label history up to a step, to be kept in its checkpoint.
        last_step: the step of the checkpoint that the run goes on from.
        """
        self._config, self._actors, self._on_complete, self._labels = config, actors, on_complete, labels
        self.last_step = last_step  # that a checkpoint covers, or will when it is written
        self._inputs = inputs.dump_digests(inputs.input_digests(config))
        self._in_flight: int | None = None

    def begin(self, trainer_state: TrainerState) -> None:
        """Takes a snapshot of the run and begins to write it, after the checkpoint before it is complete.

        Raises:
            RunError: this checkpoint or the one before it cannot be written; those that are complete stay.
        """
        self.finish()
        run_dir = self._config.run_dir
        files = {"config.yaml": dump_config(self._config).encode(), inputs.FILE_NAME: self._inputs}
        if self._labels is not None:
            files[label_history.FILE_NAME] = self._labels(trainer_state.step)
        try:
            self._actors.call("begin_save", store.new_checkpoint(run_dir, trainer_state, files))
        except (OSError, RunError) as error:
            raise self._failed(trainer_state.step, error) from error
        self._in_flight = self.last_step = trainer_state.step
        if not self._config.checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Completes the checkpoint under way if its files are written; does not wait for them."""
        if self._in_flight is not None and all(self._actors.call("save_written")):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint under way. Raises RunError if it cannot be written."""
        if self._in_flight is None:
            return
        step, self._in_flight = self._in_flight, None
        settings = self._config.checkpoint
        try:
            hashes = {name: entry for files in self._actors.call("finish_save") for name, entry in files.items()}
            store.finalize_checkpoint(
                self._config.run_dir,
                step,
                hashes,
                keep=settings.keep,
                best=settings.best_is,
                best_metric=settings.best_metric,
            )
        except (OSError, RunError) as error:
            raise self._failed(step, error) from error
        self._on_complete(step)

    def finish_or_discard(self) -> None:
        """Completes the checkpoint under way if it can be written, and removes what there is of it otherwise."""
        with suppress(RunError):
            self.finish()

    def _failed(self, step: int, error: Exception) -> RunError:
        if isinstance(error, WorkerDied):
            return error
        store.discard_unfinished(self._config.run_dir)
        whole = store.saved_steps(self._config.run_dir)
        kept = f"those of steps {', '.join(map(str, whole))} are whole" if whole else "there is none before it"
        path = store.checkpoint_path(self._config.run_dir, step)
        what = environment_problem(error, path) if isinstance(error, OSError) else error
        return RunError(f"the checkpoint of step {step} could not be written ({what}); {kept}")
