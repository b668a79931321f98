"""A generated corpus of named entities: templates filled by Faker, word lists and WordNet's nouns;
types renamed and dropped.

Two sets of unseen templates, names and types: ``TUNE``, on which the recipe of
bench/accuracy_gliner.py was chosen, and ``REPORT``, whose figures are the ones given. Training sees
neither.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS = re.compile(r"\w+(?:[-_]\w+)*|\S")  # gliner's whitespace splitter
_SLOT = re.compile(r"\{(\w*)\}")

FAKED = {
    "person": ["person", "human name", "full name", "individual", "people", "somebody's name"],
    "company": ["company", "organization", "business name", "enterprise", "business", "employer"],
    "city": ["city", "town", "place", "municipality", "city or town", "where it is"],
    "date": ["date", "calendar day", "day and month", "date of an event", "point in time"],
    "email": ["e-mail", "email address", "mail contact", "e-mail address", "mailbox"],
    "phone": ["phone", "phone number", "telephone", "telephone number", "mobile number"],
    "address": ["address", "street", "street address", "house number and street"],
    "job": ["job", "job title", "occupation", "profession", "line of work"],
    "link": ["web address", "URL", "link", "internet address"],
    "time": ["time of day", "clock time", "hour and minute"],
    "price": ["price", "amount of money", "sum of money", "cost"],
    "plate": ["licence plate", "registration number", "number plate"],
    "account": ["bank account", "IBAN", "account number"],
    "percentage": ["percentage", "share in percent", "ratio"],
    "measure": ["measurement", "physical quantity", "size or weight"],
    "year": ["year", "calendar year"],
}
"""Kinds whose values Faker or a number makes, with their names in training."""
ALIKE = [
    {"person", "scientist", "writer", "painter", "composer"},
    {"company", "car brand", "software company", "newspaper", "website", "university",
     "football club", "international organisation"},
    {"city", "US state", "island", "continent", "airport", "landmark", "lake", "mountain", "ocean",
     "desert"},
    {"date", "month", "weekday", "year", "holiday", "season", "time", "historical period"},
    {"number", "phone", "year", "price", "percentage", "measure", "account", "plate", "time"},
    {"language", "nationality"}, {"sport", "hobby", "game", "dance"}, {"email", "website", "link"},
    {"unit of measurement", "measure"}, {"clothing", "footwear"},
    {"rock", "building material"}, {"liquid", "drink", "chemical compound"},
    {"job", "political office", "military rank"}, {"tool", "kitchen utensil", "stationery"},
    {"product", "household appliance", "computer part", "kitchen utensil"},
]  # fmt: skip
"""Kinds whose values may count as each other's: none serves as a negative beside another."""
TRAIN_TEMPLATES = [
    "{person} joined {company} in {city} on {date} .",
    "Please write to {email} or call {phone} before {date} .",
    "{company} has sold the {product} in {city} since {date} .",
    "Send the invoice to {person} , {address} , {city} .",
    "{person} works as a {job} for {company} .",
    "The {job} asked for {person} at {phone} .",
    "Our {product} broke ; contact {person} ( {email} ) .",
    "{person} from {city} ordered a {product} .",
    "Call {phone} and ask for {person} .",
    "My address is {email} , my number {phone} .",
    "{company} , {address} , {city} , was founded on {date} .",
    "{person} lives in {city} and was born on {date} .",
    "In {city} , {company} presented its {product} .",
    "Since {date} {person} has been with {company} .",
    "The meeting in {city} was moved from {date} to {date} .",
    "{person} , {person} and {person} came to {city} .",
    "{company} bought {company} for {price} .",
    "The {product} costs {price} at {company} .",
    "Mail from {email} arrived at {time} .",
    "{person} said that the {product} was not for sale in {city} .",
    "Nobody knew that {} had anything to do with {} .",
    "In the story , a {} turns up next to the {} .",
    "There was {} on the left and {} on the right .",
    "She likes {} more than {} , he said .",
    "Yesterday we talked about {} , {} and {} .",
    "The report mentions {} twice and {} once .",
    "Where did you see the {} ?",
    "I would rather have {} than {} or {} .",
    "{person} drew a picture of {} and {} .",
    "What is the difference between {} and {} ?",
    "{company} never paid for the {} .",
    "Someone left {} near {city} .",
    "First came {} , then {} , and at last {} .",
    "{} , {} , {} and {} were on the list .",
    "{} is not the same as {} .",
    "You can read more about {} in chapter five .",
    "The exhibition shows {} , {} and some {} .",
    "They argued for hours over {} and {} .",
    "Is there any {} left ?",
    "Without {} there would be no {} .",
    "He dreamt of {} again .",
    "Children learn about {} before they hear of {} .",
    "I know nothing at all about {} .",
    "Our teacher explained {} with the help of {} .",
    "Some say {} , others say {} .",
    "The word {} comes before {} in the dictionary .",
    "{person} has always been fond of {} .",
    "{person} asked whether {} belongs to {} .",
    "Do not confuse {} with {} !",
    "A film about {} was shown in {city} .",
    "It reminded her of {} .",
    "The {} and the {} appear on page {number} .",
    "On {date} , {person} gave a talk about {} .",
    "Perhaps {} will do , or else {} .",
    "The museum in {city} has a room for {} .",
    "The new {} is better than the old {} .",
    "Every {} was counted , and so was every {} .",
    "He pointed at the {} and said nothing .",
    "We need two more {} and one {} .",
    "An article on {} and {} appeared on {date} .",
    "{} or {} ? That is a matter of taste .",
    "In the quiz they asked for {} , {} and {} .",
    "People in {city} have strong opinions on {} .",
    "The lecture began with {} and ended with {} .",
    "Tell me : what does {} mean to you ?",
    "The title of the song is simply {} .",
    "He could name {} , {} , {} , {} and {} .",
    "Not a word was said of {} .",
    "Examples are {} and {} .",
    "{} again ! I cannot stand {} .",
]
FREE_TEMPLATES = [t for t in TRAIN_TEMPLATES if set(_SLOT.findall(t)) == {""}]
WORDNET = 0.4
"""Share of the training texts whose types and values are WordNet's."""
ASIDES = [
    "It was late .", "Nobody answered .", "That is all we know .", "The weather did not matter .",
    "As far as I remember :", "So they say .", "Well , then .", "She laughed and closed the book .",
    "The rest is not important .", "Thank you for your letter .", "Here is what happened .",
]  # fmt: skip
"""Sentences without entities."""


@dataclass(frozen=True)
class Unseen:
    """What training never sees.

    templates: sentences with the kinds of ``renamed``, which are seen. renamed: their unseen names.
    types: unseen types, by name, with their values (None: Faker's). free: sentences for those.
    """

    templates: tuple[str, ...]
    renamed: dict[str, str]
    types: dict[str, str | None]
    free: tuple[str, ...]


TUNE = Unseen(
    (
        "After {date} you will find {person} at {company} in {city} .",
        "Whoever breaks the {product} must tell {person} by ringing {phone} .",
        "{city} is where {person} built the first {product} .",
        "For {company} , {person} answers questions sent to {email} .",
        "From {date} on , {company} leaves {city} for good .",
    ),
    {
        "person": "man or woman", "company": "corporation", "city": "urban area",
        "date": "when it takes place", "email": "address for electronic messages",
        "phone": "line to call", "product": "merchandise",
    },
    {
        "bird": "eagle,robin,sparrow,penguin,barn owl,ostrich,seagull,pigeon,swan,woodpecker,"
        "parrot,stork",
        "tree": "oak,birch,maple,Scots pine,willow,spruce,beech,palm tree,cypress,elm,larch",
        "gemstone": "diamond,ruby,emerald,sapphire,opal,topaz,amethyst,garnet,rose quartz",
        "disease": "measles,diabetes,malaria,asthma,breast cancer,tuberculosis,arthritis,cholera,"
        "smallpox,dementia",
        "river": "Nile,Danube,Amazon River,Mississippi,Rhine,Ganges,Thames,Volga,Yellow River,"
        "Seine",
        "musical genre": "jazz,reggae,hip hop,heavy metal,folk music,techno,punk rock,blues,opera,"
        "country music",
    },
    (
        "She has been reading a lot on {} and on {} .",
        "Hardly anybody at school could spell {} .",
        "This poem compares {} to {} .",
        "Ask the expert whether {} differs from {} .",
        "{person} once had a bad experience with {} .",
        "Our next topic is {} .",
    ),
)  # fmt: skip
REPORT = Unseen(
    (
        "According to {person} , the office of {company} moved to {city} last year .",
        "On {date} the {product} will be shown in {city} .",
        "Reach {person} under {phone} , or by mail at {email} .",
        "{company} hired {person} , who had invented the {product} .",
        "Was it {date} or later when {person} left {city} ?",
    ),
    {
        "person": "name of somebody", "company": "firm", "city": "location",
        "date": "day of the year", "email": "electronic mail", "phone": "dial number",
        "product": "article for sale",
    },
    {
        "country": None,
        "vegetable": "carrot,spinach,potato,red cabbage,onion,broccoli,cucumber,leek,pumpkin,"
        "celery",
        "insect": "ant,beetle,honey bee,mosquito,wasp,dragonfly,grasshopper,moth,ladybird,termite",
        "currency": None,
        "flower": "rose,tulip,sunflower,daisy,orchid,lily,daffodil,lavender,carnation,snowdrop",
        "metal": "iron,copper,stainless steel,gold,zinc,aluminium,silver,nickel,titanium,lead",
    },
    (
        "He wrote a long letter about {} , but forgot {} .",
        "Most people have heard of {} ; few could describe {} .",
        "A photograph of {} hangs above the door .",
        "Let us compare {} with {} and see .",
        "My neighbour keeps asking me about {} .",
        "{person} told me everything about {} .",
    ),
)  # fmt: skip


def _listed() -> dict[str, tuple[list[str], list[str]]]:
    """Kinds with their names and values."""
    found = {}
    path = Path(__file__).parent / "data" / "entity_types.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            names, values = line.split(": ")
            found[names.split("|")[0]] = names.split("|"), values.split(", ")
    return found


_LISTED = _listed()
VALUES = {kind: values for kind, (_, values) in _LISTED.items()}
NAMES = FAKED | {kind: names for kind, (names, _) in _LISTED.items()}
"""Kinds of training with their names. Neighbours have something in common."""


def _wordnet() -> tuple[list[list[str]], list[list[str]], dict[str, set[int]]]:
    """Of each type its names and values; of each value all of its types, however far above."""
    path = Path(__file__).parent / "data" / "wordnet_types.tsv"
    lines = [x for x in path.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    middle = lines.index("")
    names, above = [], []
    for line in lines[:middle]:
        name, parents = line.split("\t")
        names.append(name.split("|"))
        above.append([int(x) for x in parents.split()])
    of_value: dict[str, set[int]] = {}
    for line in lines[middle + 1 :]:
        given, words = line.split("\t")
        types: set[int] = set()
        waiting = [int(x) for x in given.split()]
        while waiting:
            types.add(waiting[-1])
            waiting += [x for x in above[waiting.pop()] if x not in types]
        of_value |= {word: of_value.get(word, set()) | types for word in words.split(",")}
    values: list[list[str]] = [[] for _ in names]
    for value, types in of_value.items():
        for kind in types:
            values[kind].append(value)
    return names, values, of_value


WORDNET_NAMES, WORDNET_VALUES, WORDNET_TYPES_OF = _wordnet()


class Corpus:
    """Examples in gliner's form, drawn from one seed."""

    def __init__(self, seed: int, unseen: Unseen | None = None) -> None:
        from faker import Faker

        self.draw = random.Random(seed)
        self.fake = Faker("en_US")
        self.fake.seed_instance(seed)
        types = {} if unseen is None else unseen.types
        self.values = VALUES | {kind: row.split(",") for kind, row in types.items() if row}

    def value(self, kind: str) -> str:
        fake, draw = self.fake, self.draw
        made = {
            "person": fake.name, "company": fake.company, "city": fake.city, "email": fake.email,
            "phone": fake.phone_number, "address": fake.street_address, "country": fake.country,
            "job": lambda: fake.job().split(",")[0].lower(), "currency": fake.currency_name,
            "date": lambda: fake.date(draw.choice(["%d %B %Y", "%B %d", "%Y-%m-%d"])),
            "link": fake.url, "time": lambda: fake.time("%H:%M"), "plate": fake.license_plate,
            "price": lambda: f"{draw.choice('$€£')}{draw.randint(1, 9999)}", "account": fake.iban,
            "percentage": lambda: f"{draw.randint(1, 99)} {draw.choice(['%', 'percent'])}",
            "measure": lambda: f"{draw.randint(2, 900)} {draw.choice(['kg', 'metres', 'miles'])}",
            "year": lambda: str(draw.randint(1700, 2030)),
        }  # fmt: skip
        return made[kind]() if kind in made else draw.choice(self.values[kind])

    def sentence(self, template: str, free: list[str]) -> tuple[list[str], list[list]]:
        """Words and entities; ``{}`` is filled from the types ``free``."""
        words: list[str] = []
        entities: list[list] = []
        for i, part in enumerate(_SLOT.split(template)):
            if i % 2 == 0:
                words += _WORDS.findall(part)
                continue
            kind = part or self.draw.choice(free)
            value = _WORDS.findall(self.value(kind))
            entities.append([len(words), len(words) + len(value) - 1, kind])
            words += value
        return words, entities

    def training(self, count: int) -> list[dict[str, Any]]:
        """Each example asks for its types under drawn names, without those that are dropped, and
        for types that it does not have: some of them close to its own, some at random."""
        kinds = list(NAMES)
        return [
            self._of_wordnet() if self.draw.random() < WORDNET else self._training(kinds)
            for _ in range(count)
        ]

    def _of_wordnet(self) -> dict[str, Any]:
        """No type is asked for that holds for a value drawn for another one."""
        draw, names = self.draw, WORDNET_NAMES
        words: list[str] = []
        entities: list[tuple[int, int, int, str]] = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            parts = draw.choice(FREE_TEMPLATES).split("{}")
            for i, part in enumerate(parts):
                words += part.split()
                if i + 1 < len(parts):
                    kind = draw.randrange(len(names))
                    value = draw.choice(WORDNET_VALUES[kind])
                    pieces = _WORDS.findall(value)
                    entities.append((len(words), len(words) + len(pieces) - 1, kind, value))
                    words += pieces
        own = dict.fromkeys(kind for *_, kind, _ in entities)
        near = [(k + draw.choice((-1, 1)) * draw.randint(1, 6)) % len(names) for k in own]
        others = near + draw.sample(range(len(names)), draw.randint(2, 5))
        asked = [
            kind for kind in dict.fromkeys([*own, *others])
            if all(of == kind or kind not in WORDNET_TYPES_OF[value] for *_, of, value in entities)
            and (kind not in own or draw.random() > 0.1)
        ]  # fmt: skip
        draw.shuffle(asked)
        name = {}
        for kind in asked:
            free = [x for x in names[kind] if x not in name.values()]
            if free:
                name[kind] = draw.choice(free)
        ner = [[a, b, name[kind]] for a, b, kind, _ in entities if kind in name]
        return {"tokenized_text": words, "ner": ner, "ner_labels": list(name.values())}

    def _training(self, kinds: list[str]) -> dict[str, Any]:
        draw = self.draw
        words: list[str] = []
        entities: list[list] = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            if draw.random() < 0.15:
                words += draw.choice(ASIDES).split()
            found, placed = self.sentence(draw.choice(TRAIN_TEMPLATES), kinds)
            entities += [[a + len(words), b + len(words), kind] for a, b, kind in placed]
            words += found
        own = list(dict.fromkeys(kind for *_, kind in entities))
        barred = set(own).union(*(group for group in ALIKE if group & set(own)))
        kept = [kind for kind in own if draw.random() > 0.1]
        near = [kinds[(kinds.index(k) + draw.choice((-3, -2, -1, 1, 2, 3))) % len(kinds)]
                for k in own]  # fmt: skip
        negatives = dict.fromkeys(near + draw.sample(kinds, draw.randint(2, 5)))
        asked = kept + [kind for kind in negatives if kind not in barred]
        draw.shuffle(asked)
        name = {kind: draw.choice(NAMES[kind]) for kind in asked}
        ner = [[a, b, name[kind]] for a, b, kind in entities if kind in name]
        return {"tokenized_text": words, "ner": ner, "ner_labels": list(name.values())}

    def test(
        self, count: int, templates: tuple[str, ...], names: dict[str, str]
    ) -> list[dict[str, Any]]:
        """All of ``names`` are asked for in every example; other types are no entities."""
        made = []
        for i in range(count):
            words, entities = self.sentence(templates[i % len(templates)], list(names))
            ner = [[a, b, names[kind]] for a, b, kind in entities if kind in names]
            labels = list(names.values())
            made.append({"tokenized_text": words, "ner": ner, "ner_labels": labels})
        return made


def test_sets(unseen: Unseen, seed: int = 1) -> dict[str, list[dict[str, Any]]]:
    """templates: seen types in unseen sentences; renamed: under unseen names; unseen: unseen types,
    values and sentences."""
    corpus = Corpus(seed, unseen)
    return {
        "templates": corpus.test(
            150, unseen.templates, {kind: NAMES[kind][0] for kind in unseen.renamed}
        ),
        "renamed": corpus.test(150, unseen.templates, unseen.renamed),
        "unseen": corpus.test(240, unseen.free, {kind: kind for kind in unseen.types}),
    }
