"""The conversations that trainers are given, and what their logs say."""

from tests.conversations import as_row, random_chat

CONVERSATIONS = [random_chat(3, seed=seed) for seed in range(6)]
ROWS = [as_row(passes) for passes in CONVERSATIONS]


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
