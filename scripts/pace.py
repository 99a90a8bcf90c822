"""How much `make demo` asks: as much as this machine does in three minutes, by rates that are measured first.

A machine without AVX-512, or one that others use too, is several times slower than another. So the amounts are rungs of
a ladder, and the demo takes the highest whose predicted time fits.
"""

from dataclasses import dataclass

BUDGET = 180.0
"""Seconds that the demo may take once everything is downloaded."""
SHARE = 0.8
"""Share of the seconds left that is planned for; the rest is for a machine that slows down meanwhile."""

SHOTS = 2
"""Examples that are shown before each question."""
PROMPT_TOKENS = 370
"""Tokens of a prompt, by the mean of the 12 questions."""
ENDING_STARTS = 3.0
"""Cost of two `eval gsm8k`, compare, `eval kld`, card and report beside the models' own work, in units of `start`."""
HEAD = 1.4
"""What a token costs whose logits are wanted, against one of a prompt: the head is two fifths of the layers' size."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """GSM8K's questions, the most tokens of an answer, tokens that KLD predicts."""

    questions: int
    answer: int
    kld: int


LADDER = (
    Amounts(questions=12, answer=256, kld=1024),
    Amounts(questions=10, answer=256, kld=1024),
    Amounts(questions=8, answer=256, kld=1024),
    Amounts(questions=8, answer=256, kld=512),
    Amounts(questions=6, answer=256, kld=512),
    Amounts(questions=6, answer=192, kld=512),
    Amounts(questions=5, answer=192, kld=256),
    Amounts(questions=4, answer=192, kld=256),
    Amounts(questions=4, answer=160, kld=128),
    Amounts(questions=3, answer=160, kld=128),
)
"""From everything to the fewest; no amount grows on the way down."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that a model takes: for a token of a prompt, and for a step of decoding one sequence."""

    read: float
    step: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured here: seconds until both servers had started, side by side, and the rates of both models."""

    start: float
    bf16: Rates
    int8: Rates

    def asking(self, amounts: Amounts) -> float:
        """Seconds that both models take to answer the questions."""
        return sum(_answers(rates, amounts) for rates in (self.bf16, self.int8))

    def ending(self, kld: int) -> float:
        """Seconds to compare, to predict `kld` tokens with both models, and to write the card and the report."""
        return ENDING_STARTS * self.start + kld * HEAD * (self.bf16.read + self.int8.read)

    def seconds(self, amounts: Amounts) -> float:
        """Seconds of both."""
        return self.asking(amounts) + self.ending(amounts.kld)


def _answers(rates: Rates, amounts: Amounts) -> float:
    """Seconds for all prompts, and for the answers, decoded together; each further one costs at most a prompt token."""
    together = rates.step + (amounts.questions - 1) * HEAD * rates.read
    return amounts.questions * PROMPT_TOKENS * rates.read + amounts.answer * together


def choose(machine: Machine, left: float) -> Amounts:
    """The most that `machine` does well within the `left` seconds; the fewest where even that takes longer."""
    return next((rung for rung in LADDER if machine.seconds(rung) <= SHARE * left), LADDER[-1])


def kld_tokens(machine: Machine, planned: int, left: float, *, slowed: float) -> int:
    """KLD tokens, at most `planned`, that fit into `left` seconds now that `machine` is `slowed` times slower."""
    options = [rung.kld for rung in LADDER if rung.kld <= planned]
    return next((kld for kld in options if slowed * machine.ending(kld) <= left), options[-1])


def spoken(seconds: float) -> str:
    """A duration in words: `48 s`, `2 min 5 s`, `3 min`."""
    minutes, rest = divmod(round(seconds), 60)
    return " ".join([*([f"{minutes} min"] if minutes else []), *([f"{rest} s"] if rest or not minutes else [])])
