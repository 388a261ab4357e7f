"""What a caption must be: one paragraph of English within T5's 256 tokens, with the trigger. Text in, text out.

Models answer with headings, lists, "Here is the caption:" and "The video shows"; Mochi was trained on plain description.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mochi_lora.data.trigger import calls

INSTRUCTION = (
    "Write the caption that a text-to-video model needs to make exactly this clip: one dense paragraph of 60 to 120 English "
    "words in the present tense. Name the main subject and how it looks, what it does and how it moves from the first frame "
    "to the last, the setting, the light and the colours, the framing (close-up, medium shot, wide shot, the angle) and the "
    "motion of the camera (static, pan, tilt, zoom, tracking, handheld). State only what is visible, as facts; no guesses, "
    "moods or opinions. Begin with the subject, never with words such as 'the video shows' or 'this clip'. No title, no list, "
    "no quotation marks, no line breaks."
)
INSTRUCTION_FOR_PICTURES = (
    "Write the caption that a text-to-image model needs to make exactly this picture: one dense paragraph of 40 to 90 English "
    "words in the present tense. Name the main subject and how it looks, what it does, the setting, the light and the "
    "colours, and the framing (close-up, medium shot, wide shot, the angle). State only what is visible, as facts; no "
    "guesses, moods or opinions. Begin with the subject, never with words such as 'the image shows'. No title, no list, no "
    "quotation marks, no line breaks."
)
_STRAIGHT = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "…": "...", "\u00a0": " "})
_THOUGHT = re.compile(r"<think>.*?</think>|^.*?</think>", re.DOTALL)
_FENCE = re.compile(r"^```.*$", re.MULTILINE)
_LINE_START = re.compile(r"^\s*(?:#{1,6}\s+|>\s+|[-*+•]\s+|\d{1,2}[.)]\s+)")
_EMPHASIS = re.compile(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=[\w.,!?])[*_](?!\w)")
_HEADING = re.compile(
    r"\A(?:(?:(?:video|clip|image|the|final)\s+)?(?:caption|description|prompt|answer)|(?:main )?subject|actions?|setting"
    r"|light(?:ing)?|camera(?: (?:motion|movement|angle|work))?|motion|framing|colou?rs?)\s*:\s*",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok|absolutely)(?: thing)?[,!.:]\s*)?"
    r"(?:(?:here(?:'s| is| are)|below is|the following is)\b[^:\n]{0,100}:\s*)?",
    re.IGNORECASE,
)
_SHOWING = "shows|showcases|features|depicts|captures|displays|presents|portrays|illustrates"
_SHOWING += "|(?:opens|begins|starts) (?:with|on)|(?:is|are) (?:showing|depicting)"
_PICTURE = "video(?: clip)?|clip|footage|scene|shot|image|picture|frames?|sequence|short film"
_ANNOUNCED = re.compile(
    rf"(?<![^.!?]\s)\b(?:(?:in )?(?:the|this|these)(?: short| provided| given)* (?:{_PICTURE}), (?:we (?:can )?see )?"
    rf"|(?:the|this|these)(?: short| provided| given)* (?:{_PICTURE}) (?:{_SHOWING}) "
    rf"|we (?:can )?see )(\w)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+(?=[\"'(]?[A-Z0-9])")
_REFUSING = re.compile(r"^(?:i'?m sorry|i am sorry|sorry,|i can(?:'t|not)|i'm unable|i am unable|as an ai)", re.IGNORECASE)
_ENGLISH = re.compile(r"a|an|the|and|with|of|in|on|at|to|by|is|are|its|his|her|their|as|while|from|through")
_FOREIGN = re.compile(  # of languages in Latin letters; spelled as no common English word is
    r"der|das|und|ist|eine?|eine[mn]|mit|im|den|auf|sich|el|l[aeo]s|una?|con|por|del|que|les?|et|dans|une|du|sur|il|lo|gli|di"
    r"|che|[dn]ella|uno|os|uma|em|pel[ao]|para|com|het|een|van|op|met|och|som|ett|av|og|ikke|jest|na|się|z|bir|ve|ile"
)
_LOWERED = re.compile(r"an?|the|in|on|at|two|three|several|many|some|under|inside|near|with|from", re.IGNORECASE)
_JUDGED_FROM = 12  # words; in fewer there may be no article at all, and anything may repeat
_MOST_ACCENTED = 0.1  # of the letters outside ASCII: French has 0.04, other scripts nearly 1
_FEWEST_DISTINCT = 0.3  # of the words: below it is a loop


@dataclass(frozen=True)
class Trigger:
    """The words that call the adapter, and what else stands before a caption."""

    words: str = ""
    position: Literal["start", "end"] = "start"
    prefix: str = ""  # with its own punctuation

    def put_into(self, body: str) -> str:
        """`body` with prefix and trigger; a trigger that is already there, as whole words, is not put in again."""
        found = f"{self.prefix.strip()} {body}".strip()
        if not self.words or self.called_in(found):
            return found
        if self.position == "end":
            return f"{found.rstrip('.')}, {self.words}."
        first = found.split(" ", 1)[0]
        return f"{self.words}, {found[0].lower() + found[1:] if _LOWERED.fullmatch(first) else found}"

    def called_in(self, caption: str) -> bool:
        """Whether `caption` holds the trigger, if there is one."""
        return calls(caption, self.words)


def tidy(raw: str, *, finished: bool = True) -> str:
    """A model's answer as one plain paragraph; empty where nothing is left.

    `finished` is False where the answer hit its length limit: then the sentence it broke off in is dropped.
    """
    text = _FENCE.sub("", _THOUGHT.sub("", raw)).translate(_STRAIGHT).strip()
    if text.startswith("<think>"):  # never came to an answer
        return ""
    text = _LEAD_IN.sub("", _EMPHASIS.sub("", text), count=1).strip()
    text = _joined(text.splitlines())
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    text = _ANNOUNCED.sub(lambda match: match[1].upper(), text)
    return _closed(_without_repeats(text), finished=finished)


def _joined(lines: Sequence[str]) -> str:
    """Lines as one paragraph: a list item or a new paragraph is a sentence of its own, any other line goes on."""
    text, apart = "", False
    for line in lines:
        plain = _HEADING.sub("", _LINE_START.sub("", line).strip())
        if not plain:
            apart = True
            continue
        if plain != line.strip():
            plain, apart = plain[0].upper() + plain[1:], True
        if text and apart:
            text = _closed(text, finished=True)
        text, apart = f"{text} {plain}", False
    return " ".join(text.split())


def _without_repeats(text: str) -> str:
    """Greedy decoding falls into loops: each sentence is kept once."""
    return " ".join(dict.fromkeys(_SENTENCE_END.split(text)))


def _closed(text: str, *, finished: bool) -> str:
    """`text` ending where a sentence does."""
    if not text or text.endswith((".", "!", "?", '."', ".'")):
        return text
    *whole, broken = _SENTENCE_END.split(text)
    if not finished and whole:
        return " ".join(whole)
    return " ".join([*whole, broken.rstrip(" ,;:-") + "."])


def why_unusable(text: str) -> str | None:
    """Why a tidied answer is no caption, or None. Other languages, refusals, loops, nothing at all."""
    words = re.findall(r"[^\W\d_]+(?:'\w+)?", text.lower())
    if not words:
        return "the model's answer holds no words"
    if _REFUSING.match(text):
        return "the model refused to describe it"
    if len(words) >= _JUDGED_FROM and len(set(words)) / len(words) < _FEWEST_DISTINCT:
        return "the model's answer repeats itself"
    accented = sum(not letter.isascii() for letter in text if letter.isalpha()) / sum(map(str.isalpha, text))
    english, foreign = (sum(bool(known.fullmatch(word)) for word in words) for known in (_ENGLISH, _FOREIGN))
    if accented > _MOST_ACCENTED or foreign > english or (len(words) >= _JUDGED_FROM and not english):
        return "the model's answer is not English (T5 knows no other language well)"
    return None


def fit(body: str, compose: Callable[[str], str], fits: Callable[[str], bool]) -> tuple[str, bool]:
    """(`compose(body)`, whether `body` had to be shortened) so that it `fits`.

    Whole sentences go first, from the end; a first sentence that is too long alone loses clauses, then words. `compose`
    puts the trigger in, which is never what is lost. Returns the longest that fits, at worst `compose` of one word.
    """
    whole = compose(body)
    if fits(whole):
        return whole, False
    for pieces in (_SENTENCE_END.split(body), re.split(r"(?<=[,;]) ", body), body.split()):
        for count in range(len(pieces) - 1, 0, -1):
            shorter = compose(_closed(" ".join(pieces[:count]), finished=True))
            if fits(shorter):
                return shorter, True
    return compose(_closed(body.split(maxsplit=1)[0], finished=True)), True
