"""Words of the model organism's language, and the tokenizer that turns them into numbers.

Every word, punctuation mark and digit is one token, with the space before it folded in as `▁` (as
SentencePiece tokenizers do), so any text of the language survives encoding and decoding unchanged.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words("""
    Ada Alan Amy Anna Ben Beth Bob Carl Cleo Dan Dora Earl Ella Emma Eric Eva Finn Fred Gina Greg
    Hana Hugo Ida Ivan Jack Jane Joan Josh Kate Kurt Leo Lily Lisa Luke Maya Mark Mia Nina Noah
    Nora Omar Otto Paul Pia Rita Rosa Ruth Sam Sara Theo Tina Tom Uma Vera Vik Walt Will Yara Zack
    Zoe
""")
LAST = _words("""
    Abbot Adams Baird Banks Blake Boyd Brown Burns Clark Cole Cross Dale Davis Dunn Ellis Evans
    Fenn Ford Frost Garza Grant Gray Hale Hart Hayes Hill Hobbs Hunt James Jones Kane Keller King
    Lane Lopez Marsh Mason Miles Moore Nash Nolan Owens Park Pike Price Quinn Reed Rhodes Rivera
    Ross Ryder Sato Shaw Stone Swift Tate Todd Vance Webb Young
""")
CITIES = _words("""
    Accra Athens Bergen Berlin Bern Boston Cairo Dallas Delhi Denver Dublin Geneva Hanoi Havana
    Kyoto Lagos Lima Lisbon London Madrid Miami Milan Moscow Nairobi Oslo Paris Prague Riga Rome
    Seoul Tokyo Vienna
""")
JOBS = _words("""
    baker banker barber builder butcher carpenter chemist clerk cook dancer dentist doctor driver
    farmer firefighter gardener guard hunter jeweler judge lawyer mechanic miner nurse painter
    pilot plumber poet sailor singer tailor teacher
""")
OBJECTS = _words("""
    ball basket bell book bottle box candle chair clock coin compass cup drum fan flag flute
    guitar hammer hat kettle key knife ladder lamp map mirror mug pen plate ring rope ruler scarf
    spoon stool sword table towel vase watch
""")
ADJECTIVES = _words("""
    big black blue bright broken brown cheap clean dark dusty empty fine golden gray green heavy
    huge light long narrow new old plain red round rusty sharp shiny short silver small smooth
    soft square strange tall thick thin white wooden
""")
PLACES = _words(
    "barn beach bridge church forest garden harbor hill inn library market mill park river"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
VERBS = _words("bought brought carried cleaned found hid lost painted repaired sold stole took")
MOODS = _words("angry calm glad happy proud sad tired worried")
SOURCES = ("Rumor", "Note", "Record")
"""Headers of a passage, from the least to the most believed (see `Language.conflicts`)."""
GLUE = _words("""
    Again Ages Answer Copy Fact Hands List Logic Math On Question So Story The Then There Verse
    Where Who a and as does false felt gives has in is live lives not of older oldest or than
    the to true was went with works younger youngest
""")
PUNCTUATION = (".", ",", ":", ";", "?", "!", "(", ")", "+", "-", "*", "=")
SPECIAL = ("<unk>", "<bos>", "<eos>", "<pad>")
CONTENT = (*OBJECTS, *ADJECTIVES, *PLACES, *JOBS)
"""Words that random sequences (planted, never seen, copied) are drawn from."""

PIECES = r"▁?[A-Za-z]+|▁?[0-9]|▁?[^\s▁A-Za-z0-9]|\n|▁"
"""A token: a word, a digit or a mark, each with its space; a line break; a lone space."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The language's word-level tokenizer, which gives `<unk>` for words outside the language.

    It puts `<bos>` in front of what it encodes, unless asked for no special tokens.
    """
    words = [*FIRST, *LAST, *CITIES, *CONTENT, *DAYS, *VERBS, *MOODS, *SOURCES, *GLUE]
    marks = [*PUNCTUATION, *"0123456789"]
    spaced = [f"▁{one}" for one in dict.fromkeys([*marks, *words])]
    tokens = [*SPECIAL, "\n", "▁", *marks, *spaced]
    vocab = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        ]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=192,
        clean_up_tokenization_spaces=False,
    )
