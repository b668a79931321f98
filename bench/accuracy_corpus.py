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
    "vegetable": "carrot,spinach,potato,cabbage,onion,broccoli,cucumber,leek,pumpkin,celery",
    "insect": "ant,beetle,honey bee,mosquito,wasp,dragonfly,grasshopper,moth,ladybird,termite",
    "flower": "rose,tulip,sunflower,daisy,orchid,lily,daffodil,lavender,carnation,snowdrop",
    "metal": "iron,copper,stainless steel,gold,zinc,aluminium,silver,nickel,titanium,lead",
    "bird": "sparrow,eagle,owl,robin,parrot,penguin,heron,magpie,barn swallow,woodpecker,stork,"
    "pelican",
    "fish": "salmon,trout,cod,herring,tuna,carp,pike,sea bass,haddock,mackerel,sardine,eel",
    "tree": "oak,birch,maple,willow,pine,beech,chestnut,ash,elm,spruce,poplar,cedar",
    "spice": "cinnamon,pepper,cumin,turmeric,nutmeg,saffron,cloves,cardamom,paprika,ginger,"
    "star anise",
    "herb": "basil,thyme,rosemary,mint,parsley,sage,dill,oregano,coriander,chives,lemon balm",
    "gemstone": "diamond,ruby,emerald,sapphire,opal,topaz,amethyst,jade,garnet,black pearl,amber",
    "rock": "granite,limestone,basalt,sandstone,slate,marble,chalk,flint,gneiss,pumice,shale",
    "gas": "oxygen,nitrogen,helium,hydrogen,methane,carbon dioxide,argon,neon,ozone,propane",
    "fabric": "cotton,linen,silk,velvet,denim,flannel,corduroy,tweed,nylon,polyester,canvas",
    "reptile": "crocodile,lizard,turtle,python,gecko,iguana,chameleon,rattlesnake,alligator,"
    "tortoise",
    "sea creature": "octopus,crab,jellyfish,lobster,starfish,squid,shrimp,sea urchin,oyster,coral",
    "dog breed": "poodle,labrador,beagle,bulldog,dachshund,german shepherd,terrier,husky,collie,"
    "pug",
    "nut": "almond,walnut,hazelnut,cashew,pistachio,pecan,peanut,macadamia,brazil nut,"
    "chestnut paste",
    "mushroom": "chanterelle,porcini,truffle,button mushroom,oyster mushroom,shiitake,morel,"
    "fly agaric",
    "grain": "wheat,barley,oats,rye,rice,maize,millet,quinoa,buckwheat,spelt,sorghum",
    "cheese": "cheddar,brie,gouda,mozzarella,feta,parmesan,blue cheese,camembert,goat cheese,"
    "ricotta",
    "dessert": "ice cream,apple pie,chocolate cake,pudding,tiramisu,waffle,brownie,doughnut,sorbet",
    "bread": "baguette,sourdough,bagel,brioche,pita,ciabatta,rye loaf,naan,focaccia,toast",
    "weapon": "sword,rifle,bow,spear,dagger,cannon,pistol,crossbow,hand grenade,machine gun",
    "disease": "measles,diabetes,malaria,pneumonia,asthma,influenza,tuberculosis,chicken pox,"
    "cholera",
    "medicine": "aspirin,penicillin,ibuprofen,insulin,paracetamol,antibiotics,cough syrup,morphine",
    "emotion": "joy,anger,sadness,fear,envy,pride,shame,disgust,loneliness,surprise,gratitude",
    "family member": "mother,uncle,grandfather,sister,cousin,aunt,nephew,stepbrother,daughter,"
    "niece",
    "weather": "rain,snow,hail,fog,thunderstorm,drizzle,sunshine,blizzard,strong wind,sleet,frost",
    "season or month": "spring,autumn,winter,January,April,August,October,December,early summer",
    "weekday": "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday",
    "planet": "Mercury,Venus,Mars,Jupiter,Saturn,Uranus,Neptune,Pluto",
    "religion": "Buddhism,Christianity,Islam,Hinduism,Judaism,Taoism,Shinto,Sikhism",
    "nationality": "Canadian,Brazilian,Swede,Norwegian,Australian,Mexican,Egyptian,Scotsman,"
    "Finn,Dane",
    "continent": "Africa,Europe,Asia,Antarctica,South America,North America,Oceania",
    "river": "Danube,Nile,Amazon,Rhine,Mississippi,Thames,Volga,Ganges,Yangtze,Seine",
    "mountain": "Mount Everest,Matterhorn,Kilimanjaro,Mont Blanc,Ben Nevis,K2,Mount Fuji,Etna",
    "music genre": "jazz,blues,hip hop,opera,reggae,country music,techno,folk,heavy metal,disco",
    "dance": "tango,waltz,salsa,ballet,foxtrot,flamenco,polka,rumba,tap dance,break dance",
    "game": "chess,poker,checkers,dominoes,bridge,backgammon,hide and seek,bingo,solitaire",
    "toy": "teddy bear,doll,kite,yo-yo,jigsaw puzzle,toy train,spinning top,building blocks,"
    "marbles",
    "jewellery": "necklace,ring,bracelet,earrings,brooch,tiara,cufflinks,pendant,ankle chain",
    "kitchen utensil": "spatula,whisk,ladle,rolling pin,frying pan,cheese grater,corkscrew,"
    "colander",
    "appliance": "toaster,refrigerator,dishwasher,microwave,kettle,vacuum cleaner,hair dryer,oven",
    "stationery": "pencil,eraser,stapler,envelope,notebook,paper clip,ruler,fountain pen,scissors",
    "container": "bucket,jar,barrel,wooden crate,suitcase,bottle,cardboard box,basket,tin can",
    "room": "kitchen,bedroom,cellar,attic,living room,bathroom,corridor,nursery,pantry,study",
    "shape": "triangle,circle,square,hexagon,cube,pyramid,sphere,oval,rectangle,cylinder",
    "unit of measure": "kilometre,inch,litre,gallon,kilogram,ounce,hectare,mile,acre,square metre",
    "military rank": "sergeant,colonel,general,corporal,lieutenant,major,admiral,captain,private",
    "boat": "canoe,yacht,submarine,kayak,sailing boat,raft,gondola,barge,trawler,dinghy",
    "aircraft": "glider,jet,hot air balloon,biplane,drone,airship,seaplane,parachute,fighter plane",
    "programming language": "Python,Java,Rust,Fortran,Haskell,Perl,Kotlin,Ruby,Lisp,JavaScript",
    "mythical creature": "dragon,unicorn,mermaid,troll,phoenix,werewolf,giant,centaur,goblin,elf",
    "organ": "heart,liver,lung,kidney,stomach,brain,bladder,spleen,pancreas,intestine",
    "science": "astronomy,botany,zoology,geology,psychology,archaeology,economics,linguistics",
    "shoe": "sandals,slippers,high heels,trainers,wellingtons,clogs,moccasins,ballet shoes",
    "shop": "bakery,butcher,pharmacy,bookshop,supermarket,florist,hardware store,jeweller",
    "condiment": "ketchup,mustard,mayonnaise,soy sauce,vinegar,chutney,pesto,horseradish,relish",
    "meat": "beef,pork,lamb,chicken,bacon,venison,minced veal,ham,duck breast,sausage",
    "berry": "strawberry,blueberry,raspberry,blackberry,cranberry,gooseberry,elderberry,currants",
    "crime": "burglary,murder,fraud,arson,kidnapping,shoplifting,bank robbery,perjury,blackmail",
    "natural disaster": "earthquake,flood,tsunami,hurricane,drought,avalanche,volcanic eruption",
    "landscape": "valley,desert,glacier,swamp,island,rain forest,meadow,canyon,waterfall,beach",
    "bedding": "pillow,duvet,mattress,blanket,linen sheet,quilt,cushion,sleeping bag",
    "facial feature": "moustache,eyebrow,chin,freckles,cheek,forehead,lips,beard,dimples,nose",
    "monarch": "king,queen,emperor,sultan,tsar,duke,prince,baroness,pharaoh,caliph",
    "punctuation": "comma,semicolon,full stop,question mark,hyphen,colon,exclamation mark,"
    "apostrophe",
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
    "bird": ["bird", "feathered animal"],
    "fish": ["fish", "kind of fish"],
    "tree": ["tree", "kind of tree"],
    "spice": ["spice", "seasoning"],
    "herb": ["herb", "kitchen herb"],
    "gemstone": ["gemstone", "precious stone", "jewel"],
    "rock": ["rock", "kind of stone"],
    "gas": ["gas", "gaseous substance"],
    "fabric": ["fabric", "cloth", "textile"],
    "reptile": ["reptile", "cold-blooded animal"],
    "sea creature": ["sea creature", "marine animal"],
    "dog breed": ["dog breed", "dog"],
    "nut": ["nut", "edible seed"],
    "mushroom": ["mushroom", "fungus"],
    "grain": ["grain", "cereal"],
    "cheese": ["cheese", "dairy product"],
    "dessert": ["dessert", "sweet dish"],
    "bread": ["bread", "baked good"],
    "weapon": ["weapon", "arms"],
    "disease": ["disease", "illness", "medical condition"],
    "medicine": ["medicine", "drug", "medication"],
    "emotion": ["emotion", "feeling"],
    "family member": ["family member", "relative"],
    "weather": ["weather", "weather phenomenon"],
    "season or month": ["season or month", "part of the year"],
    "weekday": ["weekday", "day of the week"],
    "planet": ["planet", "celestial body"],
    "religion": ["religion", "faith"],
    "nationality": ["nationality", "citizen"],
    "continent": ["continent", "part of the world"],
    "river": ["river", "body of water"],
    "mountain": ["mountain", "peak"],
    "music genre": ["music genre", "style of music"],
    "dance": ["dance", "dance style"],
    "game": ["game", "pastime"],
    "toy": ["toy", "plaything"],
    "jewellery": ["jewellery", "ornament"],
    "kitchen utensil": ["kitchen utensil", "cooking tool"],
    "appliance": ["appliance", "household machine"],
    "stationery": ["stationery", "office supply"],
    "container": ["container", "receptacle"],
    "room": ["room", "part of a house"],
    "shape": ["shape", "geometric figure"],
    "unit of measure": ["unit of measure", "unit"],
    "military rank": ["military rank", "army rank"],
    "boat": ["boat", "watercraft"],
    "aircraft": ["aircraft", "flying machine"],
    "programming language": ["programming language", "computer language"],
    "mythical creature": ["mythical creature", "legendary being"],
    "organ": ["organ", "internal organ"],
    "science": ["science", "field of research"],
    "shoe": ["shoe", "footwear"],
    "shop": ["shop", "store"],
    "condiment": ["condiment", "sauce"],
    "meat": ["meat", "kind of meat"],
    "berry": ["berry", "small fruit"],
    "crime": ["crime", "criminal offence"],
    "natural disaster": ["natural disaster", "catastrophe"],
    "landscape": ["landscape", "landform"],
    "bedding": ["bedding", "bed linen"],
    "facial feature": ["facial feature", "part of the face"],
    "monarch": ["monarch", "ruler", "royal title"],
    "punctuation": ["punctuation", "punctuation mark"],
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
