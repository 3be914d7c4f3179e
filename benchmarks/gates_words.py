"""Words, names, numbers and codes drawn at random: what invented facts are made of.

Owns the pools. Everything is built combinatorially, so that nothing but the text that states a value gives it away.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Draw = Callable[[random.Random], str]


def split(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The parts of a pool written as one text; between separators, an empty part counts."""
    return tuple(part.strip() for part in text.split(separator))


FIRST = split("""
    Aaron Abena Adele Akira Alma Amir Anika Anton Astrid Basil Bianca Boris Carla Cedric Chiara Clara Dalia Dario Deniz
    Diego Edith Elena Elias Emre Esther Farah Felix Fiona Frida Gideon Greta Hana Hector Helga Hugo Ilse Imani Ines
    Irina Ivan Jasper Jonas Judith Kaito Karin Kofi Lars Leila Lena Liam Lucia Magnus Maren Mateo Mei Milo Nadia Nils
    Noor Olga Omar Oscar Paula Pedro Petra Priya Quinn Rafael Renata Rosa Rupert Sana Selma Simon Sofia Stefan Tamar
    Tariq Thea Tobias Ursula Vera Viktor Wanda Wilma Xenia Yara Yusuf Zara Zoltan""")
ADJECTIVES = split("""
    amber ancient brave bright broken calm clever cold copper crimson curious dusty eager early electric empty fancy
    fierce frozen gentle giant golden grey heavy hidden hollow humble idle iron ivory jolly late lazy little lonely loud
    lucky magic marble mellow misty narrow noble odd old olive pale plain proud purple quick quiet rapid rare red round
    rusty sandy scarlet secret sharp shy silent silver simple sleepy slow smooth solid spare steady stone sunny swift
    tall tidy tiny velvet violet warm wild wooden yellow young""")
NOUNS = split("""
    acorn anchor anvil apple arrow badger balloon banjo barrel basket beetle bell bottle bridge bucket button cabin
    camel candle canoe carpet castle cedar cherry clock cloud comet cradle crane crystal dolphin dragon drum eagle
    falcon feather fiddle forest fountain fox garden glacier goose guitar hammer harbor hedgehog helmet island jacket
    kettle kite ladder lantern lemon lion lizard magnet mango maple meadow mirror monkey moose mountain needle nutmeg
    orchid otter oyster paddle panda parrot pebble pencil pepper piano pigeon pillow planet pumpkin puzzle rabbit raven
    ribbon river rocket saddle salmon scarf shovel sparrow spoon squirrel stove sunset teapot thistle tiger trumpet
    tunnel turnip umbrella valley violin walnut whistle willow window wizard wolf zebra""")
COLOURS = split("red blue green yellow orange purple brown black white grey pink turquoise beige maroon navy teal")
PLACES = split("lab office archive workshop kitchen garage studio library depot hangar cellar pharmacy clinic nursery")
VISITS = split("dentist,hairdresser,plumber,tax adviser,physiotherapist,optician,vet,notary,piano teacher,painter", ",")
DISHES = split(
    "lentil soup,mushroom risotto,fish tacos,plum dumplings,onion tart,beef stew,spinach pie,corn curry", ","
)
WARES = split("lamps chairs cables filters brushes hinges pumps valves gloves batteries ropes tiles crates sensors")
VEHICLES = split("van truck bus taxi trailer")
SETTINGS = split("limit timeout size threads retries depth interval window level")
_SHADES = split("light dark pale bright")
_ONSETS = split("b br c ch d dr f fl g gr h j k l m n p pr r s sh st t tr v w z th kl")
_VOWELS = split("a e i o u ai ea ou")
_CODAS = split("n r l m s t k nd rt lm x sh ck")
_LAST_ENDS = split("son man berg ski ley ov ini ez ard ton wick er")
_CITY_ENDS = split("ville burg ton stad haven ford mouth field dorf port minster bridge")
_MONTHS = split("January February March April May June July August September October November December")
_DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_MINUTES = (0, 5, 10, 15, 20, 30, 40, 45, 50)


def word(draw: random.Random) -> str:
    """An invented word of one or two syllables, in lower case."""
    syllables = draw.choice((1, 2))
    return "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables)) + draw.choice(_CODAS)


def name(draw: random.Random) -> str:
    return word(draw).capitalize()


def person(draw: random.Random) -> str:
    return f"{draw.choice(FIRST)} {name(draw)}{draw.choice(_LAST_ENDS)}"


def city(draw: random.Random) -> str:
    return f"{name(draw)}{draw.choice(_CITY_ENDS)}"


def thing(draw: random.Random) -> str:
    return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"


def title(draw: random.Random) -> str:
    return thing(draw).title()


def identifier(draw: random.Random) -> str:
    return thing(draw).replace(" ", "_")


def dotted(draw: random.Random) -> str:
    return f"{word(draw)}.{word(draw)}"


def phrase(draw: random.Random) -> str:
    return draw.choice((" ", "-")).join((draw.choice(ADJECTIVES), draw.choice(NOUNS), draw.choice(NOUNS)))


def digits(draw: random.Random) -> str:
    length = draw.randint(3, 8)
    return f"{draw.randrange(10 ** (length - 1), 10**length)}"


def code(draw: random.Random) -> str:
    letters, number = "".join(draw.choices(_LETTERS, k=draw.randint(2, 3))), f"{draw.randrange(100, 10_000)}"
    return draw.choice((f"{letters}-{number}", f"{letters}{number}", f"{number}-{letters}", f"{letters}/{number}"))


def password(draw: random.Random) -> str:
    spelled = f"{draw.choice(ADJECTIVES)}{draw.choice(NOUNS).capitalize()}{draw.randrange(10, 1000)}"
    strewn = "".join(draw.choices(f"{_LETTERS}{_LETTERS.lower()}23456789", k=draw.randint(7, 12)))
    return draw.choice((spelled, strewn, f"{word(draw)}_{word(draw)}{draw.choice('!?#%*')}"))


def price(draw: random.Random) -> str:
    return f"{draw.choice('$€£')}{draw.randrange(2, 2000)}.{draw.randrange(0, 100):02}"


def date(draw: random.Random) -> str:
    return draw.choice(("{1} {0}", "{0} {1}")).format(draw.randint(1, 28), draw.choice(_MONTHS))


def moment(draw: random.Random) -> str:
    return f"{draw.choice(_DAYS)} at {draw.randint(7, 19)}:{draw.choice(_MINUTES):02}"


def room(draw: random.Random) -> str:
    return f"the {draw.choice(ADJECTIVES)} {draw.choice(PLACES)}"


def address(draw: random.Random) -> str:
    return f"{draw.choice((10, 172, 192))}.{'.'.join(str(draw.randrange(1, 255)) for _ in range(3))}"


def place(draw: random.Random) -> str:
    """A gate, a shelf: a letter and a number."""
    return f"{draw.choice(_LETTERS)}{draw.randrange(1, 999)}"


def flight(draw: random.Random) -> str:
    return f"flight {draw.choice('ABKLQZ')}{draw.choice('AEXY')} {draw.randrange(100, 9999)}"


def colour(draw: random.Random) -> str:
    return f"{draw.choice(_SHADES)} {draw.choice(COLOURS)}"


def vehicle(draw: random.Random) -> str:
    return f"the {draw.choice(COLOURS)} {draw.choice(VEHICLES)} of {draw.choice(FIRST)}"


def setting(draw: random.Random) -> str:
    return f"{word(draw)}_{draw.choice(SETTINGS)}"


def release(draw: random.Random) -> str:
    return f"{draw.randrange(0, 20)}.{draw.randrange(0, 60)}.{draw.randrange(0, 30)}"


def kilometres(draw: random.Random) -> str:
    return f"{draw.randrange(12, 2900)} kilometres"
