"""A generated corpus of named entities: templates, Faker, word lists; types renamed and dropped.

Training never sees the templates, the names ``RENAMED`` and the types ``UNSEEN`` of evaluation.
"""

from __future__ import annotations

import random
import re
from typing import Any

_WORDS = re.compile(r"\w+(?:[-_]\w+)*|\S")  # gliner's whitespace splitter
_SLOT = re.compile(r"\{(\w*)\}")

LISTS = {
    "product": "Aero Kettle,Nimbus 400,UltraBook Pro,Zephyr X2,PowerDrill Max,Lumen Lamp,"
    "Pixel Pad 7,EcoWash 3000,Quantum Router,SnapCam Mini,Vortex Fan,Orion Watch 5,HydroFlow Pump,"
    "SonicBrush S1",
    "animal": "horse,tiger,elephant,rabbit,wolf,polar bear,dolphin,goat,fox,giraffe,camel,otter",
    "fruit": "apple,mango,banana,pear,pineapple,cherry,grape,peach,kiwi,blood orange,plum,melon",
    "colour": "red,dark green,blue,pale yellow,violet,turquoise,brown,pink,grey,orange,black",
    "sport": "football,tennis,ice hockey,rowing,judo,table tennis,basketball,fencing,golf,cricket",
    "instrument": "violin,piano,trumpet,cello,electric guitar,flute,drum,harp,saxophone,oboe",
    "vehicle": "truck,bicycle,tram,motorcycle,fire engine,tractor,van,ferry,helicopter,scooter",
    "drink": "coffee,green tea,beer,lemonade,red wine,apple juice,milk,cocoa,whisky,cider",
    "clothing": "jacket,scarf,wool coat,boots,hat,silk dress,gloves,jeans,sweater,shirt,socks",
    "furniture": "table,armchair,bookshelf,sofa,wardrobe,office desk,bench,stool,bed,cabinet",
    "tool": "hammer,screwdriver,saw,spanner,chisel,drill,pliers,axe,shovel,sandpaper",
    "dish": "pizza,lentil soup,risotto,pancakes,beef stew,sushi,lasagne,curry,fried rice,omelette",
    "language": "French,Japanese,Swahili,Polish,Hindi,Portuguese,Turkish,Dutch,Korean,Greek",
    "body part": "knee,left shoulder,elbow,ankle,neck,right hand,hip,wrist,back,thumb",
    "school subject": "mathematics,physics,history,chemistry,geography,biology,music theory,Latin",
    "building": "castle,railway station,museum,hospital,lighthouse,library,cathedral,warehouse",
    "vegetable": "carrot,spinach,potato,red cabbage,onion,broccoli,cucumber,leek,pumpkin,celery",
    "insect": "ant,beetle,honey bee,mosquito,wasp,dragonfly,grasshopper,moth,ladybird,termite",
    "flower": "rose,tulip,sunflower,daisy,orchid,lily,daffodil,lavender,carnation,snowdrop",
    "metal": "iron,copper,stainless steel,gold,zinc,aluminium,silver,nickel,titanium,lead",
}
NAMES = {
    "person": ["person", "human name", "full name", "individual", "people"],
    "company": ["company", "organization", "business name", "enterprise"],
    "city": ["city", "town", "place", "municipality"],
    "date": ["date", "calendar day", "day and month"],
    "e-mail": ["e-mail", "email address", "mail contact"],
    "phone": ["phone", "phone number", "telephone"],
    "address": ["address", "street", "street address"],
    "job": ["job", "job title", "occupation"],
    "product": ["product", "product name", "device"],
    "animal": ["animal", "mammal", "beast"],
    "fruit": ["fruit", "piece of fruit"],
    "colour": ["colour", "color"],
    "sport": ["sport", "ball game or sport", "athletic discipline"],
    "instrument": ["instrument", "musical instrument"],
    "vehicle": ["vehicle", "means of transport"],
    "drink": ["drink", "beverage"],
    "clothing": ["clothing", "garment", "item of clothing"],
    "furniture": ["furniture", "piece of furniture"],
    "tool": ["tool", "hand tool"],
    "dish": ["dish", "meal", "food"],
    "language": ["language", "spoken language"],
    "body part": ["body part", "part of the body"],
    "school subject": ["school subject", "subject of study"],
    "building": ["building", "kind of building"],
}
RENAMED = {
    "person": "name of somebody", "company": "firm", "city": "location", "date": "day of the year",
    "e-mail": "electronic mail", "phone": "dial number", "product": "article for sale",
}  # fmt: skip
UNSEEN = {
    "country": "country", "vegetable": "vegetable", "insect": "insect", "currency": "currency",
    "flower": "flower", "metal": "metal",
}  # fmt: skip
TRAIN_TEMPLATES = [
    "{person} joined {company} in {city} on {date} .",
    "Please write to {e-mail} or call {phone} before {date} .",
    "{company} has sold the {product} in {city} since {date} .",
    "Send the invoice to {person} , {address} , {city} .",
    "{person} works as a {job} for {company} .",
    "The {job} asked for {person} at {phone} .",
    "Our {product} broke ; contact {person} ( {e-mail} ) .",
    "{person} from {city} ordered a {product} .",
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
]
TEST_TEMPLATES = [
    "According to {person} , the office of {company} moved to {city} last year .",
    "On {date} the {product} will be shown in {city} .",
    "Reach {person} under {phone} , or by mail at {e-mail} .",
    "{company} hired {person} , who had invented the {product} .",
    "Was it {date} or later when {person} left {city} ?",
]
UNSEEN_TEMPLATES = [
    "He wrote a long letter about {} , but forgot {} .",
    "Most people have heard of {} ; few could describe {} .",
    "A photograph of {} hangs above the door .",
    "Let us compare {} with {} and see .",
    "My neighbour keeps asking me about {} .",
    "{person} told me everything about {} .",
]


class Corpus:
    """Examples in gliner's form, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        from faker import Faker

        self.draw = random.Random(seed)
        self.fake = Faker("en_US")
        self.fake.seed_instance(seed)

    def value(self, kind: str) -> str:
        fake = self.fake
        made = {
            "person": fake.name, "company": fake.company, "city": fake.city, "e-mail": fake.email,
            "phone": fake.phone_number, "address": fake.street_address, "country": fake.country,
            "job": lambda: fake.job().split(",")[0].lower(), "currency": fake.currency_name,
            "date": lambda: fake.date(self.draw.choice(["%d %B %Y", "%B %d", "%Y-%m-%d"])),
        }  # fmt: skip
        return made[kind]() if kind in made else self.draw.choice(LISTS[kind].split(","))

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
        for types that it does not have."""
        made = []
        for _ in range(count):
            words, entities = self.sentence(self.draw.choice(TRAIN_TEMPLATES), list(NAMES))
            own = list(dict.fromkeys(kind for *_, kind in entities))
            kept = [kind for kind in own if self.draw.random() > 0.15]
            others = [kind for kind in NAMES if kind not in own]
            asked = kept + self.draw.sample(others, self.draw.randint(2, 7))
            self.draw.shuffle(asked)
            name = {kind: self.draw.choice(NAMES[kind]) for kind in asked}
            ner = [[a, b, name[kind]] for a, b, kind in entities if kind in name]
            made.append({"tokenized_text": words, "ner": ner, "ner_labels": list(name.values())})
        return made

    def test(self, count: int, templates: list[str], names: dict[str, str]) -> list[dict[str, Any]]:
        """All of ``names`` are asked for in every example; other types are no entities."""
        made = []
        for i in range(count):
            words, entities = self.sentence(templates[i % len(templates)], list(names))
            ner = [[a, b, names[kind]] for a, b, kind in entities if kind in names]
            labels = list(names.values())
            made.append({"tokenized_text": words, "ner": ner, "ner_labels": labels})
        return made


def test_sets(seed: int = 1) -> dict[str, list[dict[str, Any]]]:
    """templates: seen types in unseen sentences; renamed: under unseen names; unseen: unseen types,
    values and sentences."""
    corpus = Corpus(seed)
    seen = {kind: NAMES[kind][0] for kind in RENAMED}
    return {
        "templates": corpus.test(150, TEST_TEMPLATES, seen),
        "renamed": corpus.test(150, TEST_TEMPLATES, RENAMED),
        "unseen": corpus.test(240, UNSEEN_TEMPLATES, UNSEEN),
    }
