"""The words by which refusals, boilerplate, left-over templates, damaged text and types of task are told."""

import re

FILLERS = re.findall(r"\S+", "ok okay sure done n/a na none null nan todo tbd test asdf placeholder")
REFUSAL = re.compile(
    r"^\W*("
    r"i'?m sorry,? but|(i'?m )?sorry,? i (can'?t|cannot)|i apologi[sz]e,? but"
    r"|(as an ai\b.{0,60}?)?i (cannot|can'?t|won'?t|am unable to|am not able to) "
    r"(assist|help|answer|fulfil+|provide|comply|do that|generate|create|complete|engage|discuss|support|browse|access)"
    r"|i'm (un|not )able to (assist|help|answer|fulfil+|provide|comply|do that|generate|create|complete|browse|access)"
    r"|es tut mir leid,? aber|ich kann (dir|ihnen|das|dabei) .{0,40}nicht"
    r"|lo siento,? (pero )?no puedo|je suis désolé|je ne peux pas"
    r"|mi dispiace,? (ma )?non posso|desculpe,? (mas )?não posso"
    r"|извините,? (но )?я не могу|к сожалению,? я не могу|抱歉|对不起|申し訳|죄송)",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    r"\bas an? (ai|artificial intelligence)( language)?( model| assistant)?\b|\bas a (large )?language model\b"
    r"|\bmy knowledge cut-?off\b|\bi (do not|don't) have personal (opinions|feelings|experiences)\b"
    r"|\bals ki-?(sprach)?modell\b|\ben tant qu'ia\b|\bcomo (un )?modelo de lenguaje\b"
    r"|\bregenerate response\b|\bi hope this (answer )?helps\W*$",
    re.IGNORECASE,
)
TEMPLATE_TOKENS = re.compile(
    r"<\|[a-z_]+\|>|</?s>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>"
    r"|^#{2,3} ?(instruction|response|input|human|assistant):|^(human|assistant|user|gpt|ai|bot): ",
    re.IGNORECASE | re.MULTILINE,
)
# A replacement character, UTF-8 read as Latin-1 (Ã©, â€™), halves of surrogate pairs, control characters
DAMAGE = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf]|â€[\u0080-\uffff]|[\ud800-\udfff]|[\x00-\x08\x0b\x0e-\x1f]")
MARKUP = re.compile(r"```.*?(```|\Z)|<[^>]*>|[^\n]*\|[^\n]*", re.DOTALL)  # code, tags, rows of a table
SENTENCE_END = ".!?…。！？؟।:;\"'”’»)]}`*_|>~"
UNFINISHED = frozenset(
    re.findall(
        r"\w+",
        "a an the and or of to with from is are was were which because if than und oder der die das ein eine "
        "von zu et ou le la les de des un une y o el los las del con ",
    )
)  # no sentence ends with them

# The first that fits the first instruction, by its own words: key words, not a classifier
TASKS = {
    "code": r"```|\b(python|javascript|java|c\+\+|sql|html|css|regex|code|function|algorithm|script|debug|compile)\b",
    "maths": r"\d\s*[-+*/=^×÷]\s*\d"
    r"|\b(calculate|compute|solve|equation|how many|how much|sum of|percent|probability|area of)\b",
    "summarising": r"\b(summari[sz]e|summary|tl;?dr|key points|main idea|shorten|condense)\b",
    "classification": r"\b(classify|categori[sz]e|sentiment|label|which category|true or false|odd one out)\b",
    "extraction": r"\b(extract|find all|list all the .* in|named entities|identify the (name|main|key))\b",
    "rewriting": r"\b(rewrite|rephrase|paraphrase|edit|correct|translate|convert|reword|proofread|change the)\b",
    "creative": r"\b(story|poem|song|haiku|lyrics|joke|slogan|essay|compose|imagine|invent|brainstorm"
    r"|write an? (letter|email|speech|article|dialogue|blog))\b",
    "question answering": r"\?\s*$|^(what|who|when|where|why|how|which|is|are|does|do|can|name|list|tell)\b"
    r"|^(explain|describe)\b",
}
NOT_VERBS = frozenset(
    re.findall(
        r"\w+",
        "the a an i my this that these what who when where why how which is are was do does did can could "
        "would should will you we it in on if for given please hi hello and of to from there ",
    )
)
