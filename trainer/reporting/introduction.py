"""How a session of a run opens, before its first step: its header, its files, and a picture of what it trains on."""

from __future__ import annotations

from functools import partial

from trainer.core.preflight import notes_on
from trainer.core.resuming import Resuming
from trainer.core.run import Run
from trainer.reporting.figures import drawing
from trainer.reporting.journal import Facts, Journal
from trainer.storage.checkpoint import Progress
from trainer.storage.environment import environment


def introduce(
    run: Run, journal: Journal, header: Facts, progress: Progress, resuming: Resuming
) -> None:
    """Show the header and what there is to note, and write what the run is and where it runs. A collective."""
    facts = journal.with_sharing(run.facts_of_ranks)
    journal.console.name_sets(list(run.data.named))
    journal.begin(
        header,
        progress,
        resuming.data_record,
        partial(
            environment,
            run.ranks,
            facts_of_ranks=facts,
            device_decoder=run.train_loader.device_decoder,
        ),
    )
    if resuming.data_note:
        journal.note(resuming.data_note)
    for note in notes_on(facts):
        journal.note(note)
    if run.config.run.figures and not progress.step:
        run.ranks.on_main(
            lambda: journal.figures(drawing.draw_batch(run, journal.directory))
        )
