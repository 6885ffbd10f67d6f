"""The conversations that trainers are given, and what their logs say."""

from tests.conversations import as_record, forked_rollouts, random_chat

CONVERSATIONS = [random_chat(3, seed=seed) for seed in range(6)]
WITH_ROLLOUTS = [
    random_chat(4, seed=1),
    random_chat(2, seed=2),
    forked_rollouts(3),
    random_chat(1, seed=3),
]
RECORDS = [as_record(passes) for passes in CONVERSATIONS]


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
