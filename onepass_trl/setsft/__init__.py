"""Set supervised fine-tuning (SSFT, arXiv 2510.05132): several reasoning traces per question.

Each of K forking tokens learns its own way of reasoning: the traces of a question are matched
to the tokens under which they are likeliest, and each is trained after its token.
"""

from onepass_trl.setsft.config import SetSFTConfig
from onepass_trl.setsft.diversity import ForkingDiversityCallback, generate, mutual_information
from onepass_trl.setsft.rendering import forking_prompts
from onepass_trl.setsft.tokens import add_forking_tokens, forking_tokens
from onepass_trl.setsft.trainer import SetSFTTrainer

__all__ = [
    "ForkingDiversityCallback",
    "SetSFTConfig",
    "SetSFTTrainer",
    "add_forking_tokens",
    "forking_prompts",
    "forking_tokens",
    "generate",
    "mutual_information",
]
