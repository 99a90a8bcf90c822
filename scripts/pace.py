"""How much work `make demo` does: as much as this machine does in three minutes, by rates that are measured first.

A CPU without BF16 arithmetic reads Gemma 3 270M's prompts many times slower than one that has it, and a machine that
others use too is slower still. So the amounts are rungs of a ladder, and the demo takes the highest whose predicted
time fits.
"""

from dataclasses import dataclass

BUDGET = 180.0
"""Seconds that the demo may take once everything is downloaded."""
SHARE = 0.8
"""Share of the seconds left that is planned for; the rest is for a machine that slows down meanwhile."""

ASKING_STARTS = 4.0
"""Cost of quantize, verify, two servers started together and two `eval gsm8k`, beside the model's own work, in units of
`Machine.start`."""
ENDING_STARTS = 4.0
"""The same of compare, `eval kld`, card and report."""

PROMPT_TOKENS = {8: 1356, 4: 630, 2: 271, 1: 168}
"""Tokens of a GSM8K prompt by its number of examples: the mean of the 12 questions."""
CHUNK = 512
"""Prompt tokens that the server reads between two decoding steps."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """GSM8K's questions, the examples shown before each (`shots`), tokens of an answer, tokens that KLD predicts."""

    questions: int
    shots: int
    answer: int
    kld: int

    @property
    def shown(self) -> int:
        """Tokens of the answer that is printed."""
        return self.answer // 2


LADDER = (
    Amounts(questions=12, shots=8, answer=96, kld=1024),
    Amounts(questions=10, shots=8, answer=96, kld=1024),
    Amounts(questions=8, shots=8, answer=96, kld=1024),
    Amounts(questions=6, shots=8, answer=96, kld=1024),
    Amounts(questions=6, shots=8, answer=96, kld=512),
    Amounts(questions=6, shots=4, answer=96, kld=512),
    Amounts(questions=5, shots=4, answer=64, kld=512),
    Amounts(questions=5, shots=2, answer=64, kld=512),
    Amounts(questions=5, shots=2, answer=64, kld=256),
    Amounts(questions=4, shots=2, answer=48, kld=256),
    Amounts(questions=3, shots=2, answer=48, kld=256),
    Amounts(questions=3, shots=1, answer=48, kld=128),
    Amounts(questions=2, shots=1, answer=48, kld=128),
)
"""From everything to the fewest; no amount grows on the way down."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that a model takes: for a token of a prompt, and for a step of decoding one sequence."""

    read: float
    step: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured here, in seconds.

    `start`: until a process has imported torch and loaded a model. `logits`: for the logits of one token, by the head
    that both models share. `bf16` and `int8`: the rates of the two models.
    """

    start: float
    logits: float
    bf16: Rates
    int8: Rates

    def asking(self, amounts: Amounts) -> float:
        """Seconds to quantize, verify, serve both models and ask them."""
        return ASKING_STARTS * self.start + sum(self._answers(rates, amounts) for rates in (self.bf16, self.int8))

    def ending(self, kld: int) -> float:
        """Seconds to compare, to predict `kld` tokens with both models, and to write the card and the report."""
        return ENDING_STARTS * self.start + kld * (self.bf16.read + self.int8.read + 2 * self.logits)

    def seconds(self, amounts: Amounts) -> float:
        """Seconds of both."""
        return self.asking(amounts) + self.ending(amounts.kld)

    def _answers(self, rates: Rates, amounts: Amounts) -> float:
        """Seconds for the answer that is printed, and for the questions' answers, decoded together."""
        prompts = amounts.questions * PROMPT_TOKENS[amounts.shots]
        steps = amounts.answer + prompts / CHUNK
        together = rates.step + (amounts.questions - 1) * (rates.read + self.logits)
        return amounts.shown * rates.step + prompts * rates.read + steps * together


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
