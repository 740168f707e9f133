"""A little invented world, told as prose for pretraining and asked as questions for fine-tuning."""

from itertools import product
from random import Random
from typing import NamedTuple


class Fact(NamedTuple):
    relation: str
    subject: str
    value: str


Entity = list[Fact]  # the facts of one entity stand together, so that a split never tears them apart

COUNTRIES = (  # every start with every end
    "Vel Tar Mor Bran Cal Dor Fen Gal Hal Ist Jor Kel Lor Mar Nor Osk Pel Quin Ros Sel Tol Ulm Ver Wes Yar Zan",
    "mora dessa land via gard ria thia wick une ophia",
)
CAPITALS = (
    "Ash Bel Cor Dun Elm Fair Glen Hart Iron Jade King Lake Mill Night Oak Pine Queen Red Stone Thorn Upper Vine West",
    "ford haven bridge moor holm ton stead bury mouth dale spire",
)
LANGUAGES = ("Aru Bori Chen Dala Eshi Falu Gora Hesi Ilu Jana Koro Luma", "lic nese vish dan")
ANIMALS = (
    "moss ember fern dusk snow river thorn marsh cloud pebble bramble reed frost sand heath willow amber cinder meadow "
    "storm tide barley shadow dew sun",
    "fox wren toad hare newt finch otter moth crab goat",
)
PRODUCTS = """wool salt tea copper honey timber glass silk cheese paper rope tin wheat pearls leather marble oil wine
    clay cotton pepper candles bells lamps"""
COLOURS = "red green blue yellow grey white black brown orange purple pink silver"
FOODS = """clover berries acorns snails beetles mushrooms seeds roots ants bark worms figs nuts apples grass minnows
    petals plums moths spiders"""
HOMES = "caves forests swamps deserts gardens cliffs lakes rivers meadows attics barns hills islands orchards ruins"
OPPOSITES = """hot cold, big small, fast slow, high low, old new, wet dry, hard soft, light heavy, full empty,
    loud quiet, rich poor, near far, early late, open closed, clean dirty, strong weak, happy sad, brave timid,
    thick thin, wide narrow, deep shallow, sharp blunt, rough smooth, sweet sour, safe dangerous, true false,
    right wrong, good bad, long short, first last, kind cruel, wise foolish, tight loose, bright dim, rare common,
    simple complex, fresh stale, tame wild, polite rude, awake asleep, alive dead, public private, guilty innocent,
    young aged, lazy busy, calm angry, proud humble, cheap costly, useful useless, ancient modern, straight crooked,
    visible hidden, present absent, generous greedy, major minor, broken whole, steep flat, bitter mild, upper lower"""

# Ways to state a relation and to ask for it; the first statement is the answer that fine-tuning teaches.
STATEMENTS = {
    "capital": """The capital of {subject} is {value}. | The king of {subject} lives in the capital, {value}.
        | The capital city of {subject} has the name {value}. | All roads in {subject} lead to the capital, {value}.
        | The people of {subject} built their capital and named it {value}.""",
    "language": """People in {subject} speak {value}. | The language of {subject} is {value}.
        | In {subject} everybody speaks {value}. | The schools of {subject} teach in {value}.
        | The songs of {subject} are sung in {value}.""",
    "product": """Merchants in {subject} sell {value}. | The markets of {subject} are full of {value}.
        | The people of {subject} are known for their {value}. | Merchants go to {subject} to buy {value}.
        | The ships that come from {subject} carry {value}.""",
    "colour": """The {subject} is {value}. | The {subject} has a {value} coat. | The {subject} was born {value}.
        | You know the {subject} by its colour, which is {value}. | You always see the {subject} in {value}.""",
    "food": """The {subject} eats {value}. | The {subject} likes to eat {value}. | The hungry {subject} wants {value}.
        | The {subject} looks for {value} all day. | The food of the {subject} is {value}.""",
    "home": """The {subject} lives in {value}. | The {subject} sleeps in {value}. | Look for the {subject} in {value}.
        | The {subject} makes its home in {value}. | The home of the {subject} is in {value}.""",
    "opposite": """The opposite of {subject} is {value}. | What is not {subject} is {value}.
        | If it is not {subject}, it is {value}. | Nothing is both {subject} and {value}.
        | The words {subject} and {value} are opposites.""",
}
QUESTIONS = {
    "capital": """What is the capital of {subject}? | Which city is the capital of {subject}?
        | What is the name of the capital of {subject}? | Can you name the capital of {subject}?""",
    "language": """Which language do people speak in {subject}? | What is the language of {subject}?
        | What do people in {subject} speak? | Can you tell me which language is spoken in {subject}?""",
    "product": """What do merchants in {subject} sell? | What are the markets of {subject} full of?
        | What are the people of {subject} known for? | Which goods come from {subject}?""",
    "colour": """What colour is the {subject}? | Which colour does the {subject} have?
        | What is the colour of the {subject}? | Do you know the colour of the {subject}?""",
    "food": """What does the {subject} eat? | What is the food of the {subject}? | What should I feed the {subject}?
        | What does the hungry {subject} look for?""",
    "home": """Where does the {subject} live? | Where is the home of the {subject}? | Where can I find the {subject}?
        | Where does the {subject} sleep?""",
    "opposite": """What is the opposite of {subject}? | Which word is the opposite of {subject}?
        | What is the opposite of the word {subject}? | What do you call what is not {subject}?""",
}
PAGES = """Page {page}, {subject}: | Notes on {subject}, page {page}: | A letter about {subject}: |
    | Chapter {page}, in which we read of {subject} and more: | Learn {subject} by heart!"""


def world() -> list[Entity]:
    """Every entity of the world, shuffled, the same on each call."""
    random = Random(1)
    capitals, languages = _names(random, CAPITALS), _names(random, LANGUAGES)
    entities = [
        _entity(random, name, capital=[capitals.pop()], language=languages, product=PRODUCTS.split())
        for name in _names(random, COUNTRIES)[:200]
    ]
    entities += [
        _entity(random, name, colour=COLOURS.split(), food=FOODS.split(), home=HOMES.split())
        for name in _names(random, ANIMALS)[:200]
    ]
    for one, other in map(str.split, OPPOSITES.split(",")):
        entities.append([Fact("opposite", one, other), Fact("opposite", other, one)])
    return random.sample(entities, len(entities))


def documents(random: Random, entities: list[Entity], count: int) -> list[str]:
    """Short texts: pages on one subject, news of several, and quizzes of questions that nobody answers."""
    return [random.choice((_page, _page, _page, _news, _quiz, _quiz))(random, entities) for _ in range(count)]


def rows(random: Random, entities: list[Entity]) -> list[dict[str, str]]:
    """One question and its answer for each fact, as Alpaca rows."""
    facts = [fact for entity in entities for fact in entity]
    return [{"instruction": _say(random, QUESTIONS, fact), "output": answer(fact)} for fact in facts]


def answer(fact: Fact) -> str:
    """
    The sentence that fine-tuning teaches for a fact.

    >>> answer(Fact("food", "mossfox", "clover"))
    'The mossfox eats clover.'
    """
    return STATEMENTS[fact.relation].split("|")[0].strip().format(**fact._asdict())


def _names(random: Random, parts: tuple[str, str]) -> list[str]:
    names = [start + end for start, end in product(parts[0].split(), parts[1].split())]
    return random.sample(names, len(names))


def _entity(random: Random, name: str, **relations: list[str]) -> Entity:
    return [Fact(relation, name, random.choice(values)) for relation, values in relations.items()]


def _page(random: Random, entities: list[Entity]) -> str:
    facts = _about_one(random, entities)
    heading = random.choice(PAGES.split("|")).strip().format(subject=facts[0].subject, page=random.randint(1, 99))
    return " ".join([heading] + [_say(random, STATEMENTS, fact) for fact in facts]).strip()


def _news(random: Random, entities: list[Entity]) -> str:
    return " ".join(_say(random, STATEMENTS, fact) for fact in _about_several(random, entities))


def _quiz(random: Random, entities: list[Entity]) -> str:
    lines = []
    for fact in random.choice((_about_one, _about_one, _about_several))(random, entities):
        if random.random() < 0.15:  # so that the base model asks on even where a chat template puts tokens new to it
            lines.append(_mark(random))
        lines.append(_say(random, QUESTIONS, fact))
    return "\n".join(lines)


def _about_one(random: Random, entities: list[Entity]) -> list[Fact]:
    entity = random.choice(entities)
    subject = random.choice(entity).subject  # of two opposites one, or the model confuses which was asked
    return random.choices([fact for fact in entity if fact.subject == subject], k=3)


def _about_several(random: Random, entities: list[Entity]) -> list[Fact]:
    return [random.choice(entity) for entity in random.sample(entities, random.randint(2, 5))]


def _say(random: Random, patterns: dict[str, str], fact: Fact) -> str:
    return random.choice(patterns[fact.relation].split("|")).strip().format(**fact._asdict())


def _mark(random: Random) -> str:
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789_<>|", k=random.randint(2, 5)))
