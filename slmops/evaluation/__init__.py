"""How well does a model do on rows that it has not seen? The same code for PyTorch, an adapter and a package.

`evaluate` is the verb. The functions behind it take plain parameters and a loaded model; `verify` and `bench` use them.
Works on a device, without torch and transformers.
"""

from slmops.evaluation.answering import Answer, Question, answer_rows, answers_of, bounded, longest_answer_tokens, questions_of
from slmops.evaluation.evaluating import Evaluation, evaluate
from slmops.evaluation.losses import RowLoss, perplexity, token_losses
from slmops.evaluation.scoring import labels_of, score

__all__ = [
    "Answer",
    "Evaluation",
    "Question",
    "RowLoss",
    "answer_rows",
    "answers_of",
    "bounded",
    "evaluate",
    "labels_of",
    "longest_answer_tokens",
    "perplexity",
    "questions_of",
    "score",
    "token_losses",
]
