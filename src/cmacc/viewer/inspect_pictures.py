"""The keys of one selection as pictures: who was chosen for which query, likely false negatives, duplicates."""

from collections.abc import Sequence

from cmacc.encoders import Modality
from cmacc.negatives import Keys
from cmacc.viewer.gallery import ClipPictures
from cmacc.viewer.page import escape
from cmacc.viewer.replay import Selection, SelectionReplay
from cmacc.viewer.selection import HardNegative, SelectionFacts, hard_negatives, near_duplicates, repeated_samples

_SHOWN = 12  # of the chosen, and of the draw
_HARD_NEGATIVES = 4
_PAIRS = 3
_LEAST_COSINE = 0.98
_NOUN = {"audio": "sound", "video": "picture"}
_OTHER: dict[Modality, Modality] = {"audio": "video", "video": "audio"}


class KeyPictures:
    """Pictures of the very windows that keys and queries were encoded from."""

    def __init__(self, replay: SelectionReplay) -> None:
        self._replay = replay
        self._pictures = ClipPictures(replay.manifest, replay.config.data.clip, replay.config.encoder.mel_bins)
        self._labels = replay.manifest.column("label")

    def key(self, keys: Keys, place: int, modality: Modality | None) -> str:
        """A key's clip; its other half is pale where ``modality`` names the key's own."""
        sample_id = int(keys.sample_ids[place])
        return self._clip(sample_id, int(self._replay.encoded_at(keys)[place]), modality)

    def query(self, sample_id: int, step: int, modality: Modality | None) -> str:
        """A query's clip."""
        return self._clip(sample_id, step, modality)

    def label(self, sample_id: int) -> str | None:
        """The sample's label, plain text."""
        label: str | None = self._labels[sample_id]
        return label

    def same_label(self, first: int, second: int) -> bool:
        """Whether two samples have one label, a known one."""
        return self.label(first) is not None and self.label(first) == self.label(second)

    def name(self, sample_id: int) -> str:
        """Label, if it is known, and file name, as HTML."""
        label, record = self.label(sample_id), self._replay.manifest.records[sample_id]
        title = f"<b>{escape(label)}</b>" if label else ""
        return f"{title}<small>{escape(record.name)}</small>"

    def _clip(self, sample_id: int, step: int, modality: Modality | None) -> str:
        window = sample_id, self._replay.start_seconds(sample_id, step)
        frames, sound = self._pictures.frames(*window), self._pictures.sound(*window)
        video = f'<div class="pale">{frames}</div>' if modality == "audio" else f"<div>{frames}</div>"
        audio = f'<div class="pale">{sound}</div>' if modality == "video" else f"<div>{sound}</div>"
        return audio + video if modality == "audio" else video + audio


def groups_part(pictures: KeyPictures, selection: Selection, facts: SelectionFacts) -> str:
    """The first chosen and drawn keys, each beneath the query that it was assigned to."""
    shown = [("chosen", int(place), order) for order, place in enumerate(selection.chosen[:_SHOWN], start=1)]
    shown += [("random", int(place), order) for order, place in enumerate(facts.drawn[:_SHOWN], start=1)]
    by_query: dict[int, list[tuple[str, int, int]]] = {}
    for item in shown:
        by_query.setdefault(int(facts.pseudo_labels[item[1]]), []).append(item)
    asks = selection.query_modality
    groups = []
    # The queries that most of the chosen keys were assigned to come first.
    for query, items in sorted(by_query.items(), key=lambda group: (-_count(group[1]), group[0])):
        sample_id = int(selection.query_ids[query])
        head = (
            f'<div class="head">{pictures.query(sample_id, selection.step, asks)}<b>Query {query + 1}</b>'
            f"{pictures.name(sample_id)}</div>"
        )
        tiles = "".join(_tile(pictures, selection, facts, sample_id, *item) for item in items)
        groups.append(f'<article class="group">{head}<ol class="keys">{tiles}</ol></article>')
    count = min(_SHOWN, len(selection.chosen))
    noun = _NOUN[selection.modality]
    return (
        f"<h4>Chosen keys beside random ones</h4><p>The first {count} of {len(selection.chosen)} chosen keys (blue, "
        f"in the order of picking) and the first {count} of the random draw (orange); a key may be in both. On the "
        f"left the query of the batch, a {_NOUN[asks]}, that they were assigned to: the one each key is most like; "
        f"“sure” says how clearly. The keys are {noun}s; the half of a clip that took no part is pale. Frames read "
        "from left to right, then down; spectrograms show 60 dB, low tones below.</p>"
        f'<div class="groups">{"".join(groups)}</div>'
    )


def hard_negatives_part(pictures: KeyPictures, selection: Selection, _: SelectionFacts) -> str:
    """Negatives that outdo the right key."""
    found, share = hard_negatives(selection)
    keys, noun = selection.dictionary, _NOUN[selection.modality]
    asks = _OTHER[selection.modality]
    heading = "<h4>Likely false negatives</h4>"
    pairs = f"the {len(selection.contrasted)} × {len(keys)} pairs of a query and a key of the dictionary"
    if not found:
        return f"{heading}<p>None: in none of {pairs} does the key lie nearer to the query than the right one.</p>"
    articles: list[str] = []
    seen: set[int] = set()
    for one in found:
        if len(articles) == _HARD_NEGATIVES or one.query in seen:  # one odd query would else fill the row
            continue
        seen.add(one.query)
        own, other = int(selection.query_ids[one.query]), int(keys.sample_ids[one.key])
        mark = '<b class="false">same label</b>' if pictures.same_label(own, other) else ""
        articles.append(
            f"<li><div>{pictures.query(own, selection.step, None)}{pictures.name(own)}<small>query {one.query + 1} "
            f"and its own {noun}: cosine {one.own_cosine:.2f}</small></div><div>"
            f"{pictures.key(keys, one.key, selection.modality)}{pictures.name(other)}{mark}"
            f"<small>a negative, {noun}: cosine {one.cosine:.2f} with query {one.query + 1}</small></div></li>"
        )
    return (
        f"{heading}<p>In {100 * share:.1f} % of {pairs} the key lies nearer to the query, a {_NOUN[asks]}, than the "
        f"query's own {noun} does (for encoders that know nothing it would be half). Such a negative is hard, or it "
        f"is false: the same is seen or heard in it.{_by_label(pictures, selection, found)} The clearest cases, a "
        "query at "
        f'most once; left the query, right the negative:</p><ol class="pairs">{"".join(articles)}</ol>'
    )


def duplicates_part(pictures: KeyPictures, selection: Selection, _: SelectionFacts) -> str:
    """Keys that say the same twice."""
    keys = selection.dictionary
    pairs, count = near_duplicates(keys, _LEAST_COSINE)
    among_chosen = near_duplicates(selection.pool[selection.chosen], _LEAST_COSINE)[1]
    repeats = repeated_samples(keys)
    all_pairs = len(keys) * (len(keys) - 1) // 2
    text = (
        f"In the dictionary {repeats:,} of {len(keys):,} keys are of a sample that stands in it already. Of its "
        f"{all_pairs:,} pairs of keys {count:,} are of different samples and yet nearly one (cosine above "
        f"{_LEAST_COSINE}), among the chosen alone {among_chosen:,}."
    )
    if count > 0.5 * all_pairs > 0:
        text += " That is most of them: the embeddings have hardly come apart, and no choice could be varied."
    heading = "<h4>Duplicates</h4>"
    if not pairs:
        return f"{heading}<p>{text}</p>"
    articles = []
    for pair in pairs[:_PAIRS]:
        first, second = (
            f"<div>{pictures.key(keys, place, selection.modality)}{pictures.name(int(keys.sample_ids[place]))}"
            f"<small>cosine {pair.cosine:.3f}</small></div>"
            for place in (pair.first, pair.second)
        )
        articles.append(f"<li>{first}{second}</li>")
    return f'{heading}<p>{text} The most alike pairs:</p><ol class="pairs">{"".join(articles)}</ol>'


def _by_label(pictures: KeyPictures, selection: Selection, found: Sequence[HardNegative]) -> str:
    """How many of the leading keys are false negatives by label, and how many would be by chance."""
    keys = selection.dictionary
    pairs = [(int(selection.query_ids[one.query]), int(keys.sample_ids[one.key])) for one in found]
    known = [(own, other) for own, other in pairs if pictures.label(own) is not None and pictures.label(other)]
    if not known:
        return ""
    same = sum(pictures.same_label(own, other) for own, other in known)
    held = [label for place in keys.sample_ids.tolist() if (label := pictures.label(place)) is not None]
    chance = sum(held.count(label) / len(held) for own, _ in known if (label := pictures.label(own)) is not None)
    return (
        f" Of the {len(known)} keys that lead so over some query, {same} have the label of the query over which they "
        f"lead by most: false, if labels say what is alike. Of as many keys taken at random about {chance:.0f} would "
        "have it."
    )


def _count(items: Sequence[tuple[str, int, int]]) -> int:
    return sum(kind == "chosen" for kind, _, _ in items)


def _tile(
    pictures: KeyPictures, selection: Selection, facts: SelectionFacts, query_id: int, kind: str, place: int, order: int
) -> str:
    sample_id = int(selection.pool.sample_ids[place])
    age = selection.step - int(selection.pool.steps[place])
    mark = '<b class="false">same label as the query</b>' if pictures.same_label(sample_id, query_id) else ""
    facts_shown = f"sure {100 * float(facts.posteriors[place]):.0f} %, {age} {'step' if age == 1 else 'steps'} old"
    return (
        f'<li class="{kind}">{pictures.key(selection.pool, place, selection.modality)}{pictures.name(sample_id)}{mark}'
        f"<small>{kind} #{order}, {facts_shown}</small></li>"
    )
