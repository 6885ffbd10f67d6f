"""The conversations that trainers are given, and what their logs say."""

from tests.conversations import as_record, random_chat

CONVERSATIONS = [random_chat(3, seed=seed) for seed in range(6)]
RECORDS = [as_record(passes) for passes in CONVERSATIONS]


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
