"""From an answer to a caption as T5 will see it: the rules of `caption_text` with the real tokenizer."""

from dataclasses import dataclass

from mochi_lora.config.schema import Config
from mochi_lora.curation.caption_text import Trigger, fit, tidy, why_unusable
from mochi_lora.curation.captioner import Answer
from mochi_lora.model.base import locate
from mochi_lora.model.text import Tokenised, Tokenizer, load_tokenizer, tokenise


@dataclass(frozen=True)
class Written:
    """A caption, or why there is none (`text` is then empty)."""

    text: str
    tokens: int  # T5's, the closing </s> included
    refused: str | None
    shortened: bool


@dataclass(frozen=True)
class Rules:
    """How an answer becomes a caption of one configuration."""

    trigger: Trigger
    tokenizer: Tokenizer
    unknown_limit: float

    @classmethod
    def of(cls, config: Config) -> "Rules":
        """With the tokenizer of `model.base`; nothing else of it is read. Raises UserError where it is missing."""
        settings = config.caption
        words = config.evaluation.trigger if settings.trigger is None else settings.trigger
        tokenizer = load_tokenizer(locate(config.model.base, config.model.revision, "tokenizer"))
        trigger = Trigger(words.strip(), settings.trigger_position, settings.prefix)
        return cls(trigger, tokenizer, config.encode.unknown_token_limit)

    def caption(self, answer: Answer) -> Written:
        """Tidied, with the trigger, within 256 tokens; refused where it is no English description."""
        body = tidy(answer.text, finished=answer.finished)
        if reason := why_unusable(body):
            return Written("", 0, reason, shortened=False)
        text, shortened = fit(body, self.trigger.put_into, lambda text: not self.tokens(text).truncated)
        told = self.tokens(text)
        if told.unknown_share > self.unknown_limit:
            reason = f"{told.unknown_share:.0%} of the answer's tokens are unknown to T5 (it knows English)"
            return Written("", 0, reason, shortened=False)
        return Written(text, len(told.ids), None, shortened)

    def tokens(self, text: str) -> Tokenised:
        """As T5 will see it, cut at 256."""
        return tokenise(self.tokenizer, [text])[0]
