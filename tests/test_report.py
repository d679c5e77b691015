"""The report says what its data say, safely, in one file, the same way every time."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from qjax import recipes, report_pictures
from qjax import report_words as words
from qjax.core import metrics
from qjax.report import (
    ClassAgreement,
    ComparisonReport,
    FeatureDistance,
    LayerResult,
    Timing,
    VariantResult,
    as_dict,
    image_grid,
    render_html,
    save_html,
    save_png,
    summary_sentences,
    summary_table,
)
from qjax.report_chart import _linear_ticks, _log_ticks, _range, _step_ticks
from qjax.report_how import STAGES
from qjax.report_pictures import (
    NOT_FINITE,
    error_ceiling,
    error_picture,
    heat_palette,
    picture,
)
from qjax.report_worse import losses, not_measured

HOSTILE = """<script>alert("1")</script>&'"""


def smooth(seed, n=3, h=28, w=24, c=1):
    rng = np.random.default_rng(seed)
    coarse = rng.random((n, h // 4, w // 4, c))
    return coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.float32)


def make_layers():
    quantized = LayerResult(
        path="blocks_0/attn/to_q/kernel",
        kind="dense",
        shape=(64, 192),
        weight_bits=4,
        act_bits=8,
        group_size=32,
        bytes_float=49152,
        bytes_quantized=6912,
        weight_sqnr=20.0,
    )
    kept = LayerResult(
        path="patch_embed/kernel",
        kind="conv",
        shape=(2, 2, 1, 64),
        weight_bits=None,
        bytes_float=1024,
        bytes_quantized=1024,
        reason="first layer",
    )
    return quantized, kept


def make_variant(reference, name="W4A8", error=0.05, **changes):
    images = np.clip(reference + error * (smooth(9, *reference.shape) - 0.5), 0, 1)
    fields = {
        "name": name,
        "how": "4-bit weights in groups of 32, 8-bit activations",
        "images": images,
        "bytes_quantized": 1_600_000,
        "psnr": metrics.psnr(images, reference, data_range=1.0),
        "ssim": metrics.ssim(images, reference, data_range=1.0),
        "error_per_step": error * np.linspace(0.2, 1, 5),
        "timing": Timing(seconds_float=1e-3, seconds_quantized=2e-3, batch=4, repeats=5),
        "distances": (
            FeatureDistance(
                name="FD",
                value=5.5,
                value_float=5.0,
                net="zoo classifier",
                reference="the test set",
                n=512,
            ),
            FeatureDistance(name="KID", value=0.01, net="zoo classifier", n=512),
        ),
        "agreement": ClassAgreement(value=0.96, value_float=0.98, net="zoo classifier", n=512),
        "layers": make_layers(),
        "settings": (("Recipe", "w4a8"), ("Groups", "32 weights share one scale")),
        "notes": ("Ranges are taken at every step.",),
    }
    return VariantResult(**(fields | changes))


def make_report(variants=None, shape=(3, 28, 24, 1), **changes):
    reference = smooth(0, *shape)
    n = len(reference)
    fields = {
        "title": "Fashion DiT in 4 bits",
        "model": "a small network that draws clothes",
        "device": "a test machine",
        "sampler": "DDIM, 5 steps",
        "versions": (("qjax", "0.1"), ("jax", "0.10")),
        "seeds": tuple(range(3, 3 + n)),
        "labels": ("coat", "shoe", "bag")[:n],
        "float_images": reference,
        "bytes_float": 6_400_000,
        "variants": variants or (make_variant(reference), make_variant(reference, "W8A8", 0.01)),
        "timesteps": (801.0, 601.0, 401.0, 201.0, 1.0),
    }
    return ComparisonReport(**(fields | changes))


def with_variant(report=None, **changes):
    report = report or make_report()
    variant = dataclasses.replace(report.variants[0], **changes)
    return dataclasses.replace(report, variants=(variant,))


class Page(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    VOID = frozenset({"meta", "img", "input", "br", "link", "wbr"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "wbr":
            self.text.append("\0")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).replace(" \0 ", "").replace("\xa0", " ").split())

    def all(self, tag, css=None):
        return [a for t, a in self.tags if t == tag and (css is None or css in a.get("class", ""))]


def pixels(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


# --- The page ----------------------------------------------------------------------------


def test_page_is_well_formed_and_holds_every_section():
    page = Page(render_html(make_report()))
    for heading in ("Before and after", "The numbers", "Same noise", "Layer by layer"):
        assert heading in page.words
    assert page.all("html") == [{"lang": "en"}]
    assert any(m.get("name") == "viewport" for m in page.all("meta"))


def test_page_loads_nothing_and_forbids_loading():
    text = render_html(make_report())
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_pictures)
    page = Page(text)
    assert [link["href"] for link in page.all("link")] == ["data:,"]  # no icon is asked for
    assert not page.all("iframe")
    assert all("src" not in script for script in page.all("script"))
    assert all(i["src"].startswith("data:") for i in page.all("img") if "src" in i)
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["content"].endswith(f"script-src 'sha256-{digest}'")


def test_page_is_the_same_for_the_same_data():
    assert render_html(make_report()) == render_html(make_report())


@pytest.mark.parametrize("shape", [(3, 28, 24, 1), (2, 32, 32, 3)])
def test_every_picture_is_on_the_page_pixel_for_pixel(shape):
    report = make_report(shape=shape)
    shots = Page(render_html(report)).all("img", "shot")
    assert len(shots) == shape[0] * (1 + len(report.variants))
    columns = [report.float_images] + [variant.images for variant in report.variants]
    for i, shot in enumerate(shots):
        row, column = divmod(i, len(columns))
        expected = np.round(columns[column][row] * 255).astype(np.uint8)
        expected = np.broadcast_to(expected, (*shape[1:3], 3))
        np.testing.assert_array_equal(pixels(shot["src"]), expected)
        assert report.picture_names[row] in shot["alt"]


def test_every_picture_has_an_error_map_and_alternative_text():
    report = make_report()
    page = Page(render_html(report))
    maps = [img for img in page.all("img", "map") if "src" in img]
    assert len(maps) == len(report.seeds) * len(report.variants)
    assert all(img.get("alt") for img in page.all("img") if "src" in img)


def test_all_text_is_escaped():
    layer = dataclasses.replace(make_layers()[1], path=HOSTILE, kind=HOSTILE, reason=HOSTILE)
    reference = smooth(0)
    variant = make_variant(
        reference,
        name=HOSTILE,
        how=HOSTILE,
        notes=(HOSTILE,),
        layers=(layer,),
        distances=(FeatureDistance(name=HOSTILE, value=1, net=HOSTILE, reference=HOSTILE, n=2),),
        agreement=ClassAgreement(value=0.5, value_float=0.5, net=HOSTILE, n=2),
    )
    report = make_report(
        (variant,),
        title=HOSTILE,
        model=HOSTILE,
        device=HOSTILE,
        sampler=HOSTILE,
        versions=((HOSTILE, HOSTILE),),
        labels=(HOSTILE,) * 3,
        float_dtype=HOSTILE,
        notes=(HOSTILE,),
    )
    text = render_html(report)
    assert "<script>alert" not in text
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.words.count(HOSTILE) > 20
    shots = page.all("img", "shot")
    assert shots[1]["data-name"] == HOSTILE and HOSTILE in shots[0]["alt"]


def test_slower_is_said_in_words_and_marked():
    page = Page(render_html(make_report()))
    assert "2.00 times SLOWER" in page.words and "2.00× slower" in page.words
    assert "a test machine" in page.words
    assert page.all("td", "bad") and page.all("div", "stat bad")


def test_page_says_what_is_left_in_float_and_why():
    words_on_page = Page(render_html(make_report())).words
    assert "1 of 2 tensors quantized, 1 left in float" in words_on_page
    assert "first layer" in words_on_page
    for text in ("blocks_0/attn/to_q/kernel", "64 × 192", "W4A8", "32", "49.2 kB", "6.91 kB"):
        assert text in words_on_page


def test_page_names_net_and_n_of_every_distance():
    words_on_page = Page(render_html(make_report())).words
    assert "FD to the test set zoo classifier; n = 512" in words_on_page
    assert "KID to the float model's pictures" in words_on_page


def test_page_without_optional_parts_renders():
    report = with_variant(
        make_report(labels=(), timesteps=()),
        ssim=None,
        timing=None,
        distances=(),
        agreement=None,
        layers=(),
        notes=(),
    )
    page = Page(render_html(report))
    assert "speed not measured" in page.words
    assert "Layer by layer" not in page.words and "Class agreement" in page.words  # glossary
    assert "seed 3" in page.words


def test_equal_pictures_are_called_identical_and_render():
    report = make_report()
    n = len(report.seeds)
    equal = with_variant(
        report,
        images=report.float_images,
        psnr=np.full(n, np.inf),
        ssim=np.ones(n),
        error_per_step=np.zeros(5),
    )
    page = Page(render_html(equal))
    assert "identical" in page.words and "inf" not in page.words.lower().split()
    assert "pixel for pixel" in page.words


def test_broken_pictures_are_reported_not_hidden():
    report = make_report(timesteps=())
    images = report.variants[0].images.copy()
    images[1, 5, 5] = np.nan
    psnr = np.array([30.0, np.nan, 31.0])
    broken = with_variant(
        report,
        images=images,
        psnr=psnr,
        ssim=psnr / 40,
        error_per_step=np.array([0.1, np.nan, np.inf]),
    )
    page = Page(render_html(broken))
    assert "BROKEN: 1 of the 3 pictures shown" in page.words
    assert "1 of 3 broken" in page.words
    assert tuple(pixels(page.all("img", "shot")[3]["src"])[5, 5]) == NOT_FINITE
    out = io.StringIO()
    Console(file=out).print(summary_table(broken))
    assert f"{61 / 80:.3f}" in out.getvalue() and "nan" not in out.getvalue()


def test_save_html_replaces_the_file_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    save_html(make_report(), path)
    assert path.read_text(encoding="utf-8") == render_html(make_report())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# --- What got worse, and how it was made -------------------------------------------------


def losses_of(report):
    found = losses(report, report.variants[0])
    return {loss.what: loss.text.replace("\xa0", " ") for loss in found}


def test_what_got_worse_names_numbers_pictures_step_and_layers():
    report = with_variant(
        psnr=np.array([35.0, 18.0, 25.0]), error_per_step=np.array([0.01, 0.02, 0.10, 0.12, 0.13])
    )
    said = losses_of(report)
    assert said["Slower"].endswith("instead of 1.00 ms on a test machine: 2.00× slower.")
    assert "96.0 % of the pictures instead of 98.0 %: 10 fewer of 512" in said["Off the subject"]
    assert "FD to the test set rose from 5.00 to 5.50" in said["Further from the reference"]
    assert said["Pictures"].startswith("2 of 3 differ")
    assert "1 of them at a glance (below 20 dB)" in said["Pictures"]
    least = "The least alike of all: seed 4: shoe, 18.0 dB; seed 5: bag, 25.0 dB"
    assert least in said["Pictures"]
    assert "most at step 3 of 5, from 2.0 % to 10.0 % of its size" in said["Worst step"]
    assert said["Worst layers"].endswith("blocks_0/attn/to_q, 10.0 %.")
    assert "Most sensitive layers" not in said


def test_pictures_that_anybody_tells_apart_are_bad_news_and_others_are_not():
    tone = lambda psnr: words.fidelity_verdict(with_variant(psnr=np.full(3, psnr)).variants[0]).tone
    assert (tone(19.9), tone(20.1), tone(np.inf)) == ("bad", "even", "good")
    unseen = losses_of(with_variant(psnr=np.array([35.0, 31.0, np.nan])))["Pictures"]
    assert unseen.startswith("None of 2 differs") and "seed 4: shoe, 31.0 dB" in unseen


def test_the_worst_pictures_are_not_called_the_worst_of_all_when_a_worse_one_is_not_shown():
    report = with_variant(psnr=np.array([35.0, 18.0, 25.0, 9.0]), ssim=None)
    assert "The least alike of those shown: seed 4" in losses_of(report)["Pictures"]


def test_a_model_that_lost_nothing_has_no_losses():
    report = make_report()
    (layer, _) = make_layers()
    equal = with_variant(
        images=report.float_images,
        psnr=np.full(3, np.inf),
        error_per_step=np.zeros(5),
        timing=None,
        distances=(),
        agreement=None,
        layers=(dataclasses.replace(layer, weight_sqnr=np.inf, output_sqnr=np.inf),),
    )
    assert losses_of(equal) == {}
    assert "Nothing that was measured got worse." in Page(render_html(equal)).words


def test_what_was_not_measured_is_said_so():
    bare = with_variant(timing=None, ssim=None, distances=(), agreement=None)
    missing = not_measured(bare.variants[0])
    assert missing[0] == "speed" and "the effect of each layer alone on the answers" in missing
    assert "Not measured: speed; SSIM; distances" in Page(render_html(bare)).words
    assert not_measured(make_report().variants[0]) == missing[-1:]


def test_layers_are_ranked_by_their_effect_where_it_was_measured_else_by_their_weights():
    (layer, kept) = make_layers()
    layers = tuple(
        dataclasses.replace(layer, path=f"block_{i}/kernel", weight_sqnr=20.0 + i)
        for i in range(14)
    )
    bars = lambda found: re.findall(
        r"<li><code>(.*?)</code>.*?<b>(.*?)</b><i [^>]*width:([\d.]+)%",
        render_html(with_variant(layers=(*found, kept))).replace("<wbr>", ""),
    )
    by_weight = bars(layers)
    assert [path for path, _, _ in by_weight] == [f"block_{i}" for i in range(12)]
    assert by_weight[0][1:] == ("10.0\xa0%", "100.0") and float(by_weight[11][2]) < 30
    page = Page(render_html(with_variant(layers=(*layers, kept))))
    assert "2 more layers move less" in page.words
    by_effect = bars(dataclasses.replace(one, output_sqnr=60.0 - i) for i, one in enumerate(layers))
    assert by_effect[0][:2] == ("block_13", "0.4\xa0%")
    broken = bars((dataclasses.replace(layer, weight_sqnr=-np.inf), layer))
    assert broken[0][1:] == ("not a number", "100.0") and broken[1][1] == "10.0\xa0%"


def test_how_it_was_quantized_is_on_the_page():
    words_on_page = Page(render_html(make_report())).words
    assert "How it was quantized" in words_on_page
    assert "Recipe w4a8 Groups 32 weights share one scale" in words_on_page


def test_every_stage_of_a_recipe_has_words():
    for name in recipes.RECIPES:
        for stage in recipes.by_name(name).stages:
            assert type(stage).__name__ in STAGES, name


def test_headings_go_down_one_level_at_a_time():
    levels = [
        int(tag[1]) for tag, _ in Page(render_html(make_report())).tags if re.match("h[1-6]", tag)
    ]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


# --- Words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.00"),
        (3.14159, "3.14"),
        (0.01234, "0.0123"),
        (123.4, "123"),
        (12345.0, "12,345"),
        (-0.5, "−0.500"),
        (1e-9, "1.00e-09"),
        (float("inf"), "∞"),
        (float("nan"), "not a number"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert words.number_text(value) == text


@pytest.mark.parametrize(
    "count, text",
    [(999, "999 bytes"), (1_790_000, "1.79 MB"), (12_300, "12.3 kB"), (3_460_000_000, "3.46 GB")],
)
def test_bytes_are_decimal(count, text):
    assert words.bytes_text(count).replace("\xa0", " ") == text


@pytest.mark.parametrize(
    "seconds, text, tone",
    [
        (0.5, "2.00× faster", "good"),
        (0.99, "same speed", "even"),
        (1.01, "same speed", "even"),
        (1.5, "1.50× slower", "bad"),
    ],
)
def test_speed_is_judged_against_float_in_the_same_run(seconds, text, tone):
    timing = Timing(seconds_float=1.0, seconds_quantized=seconds, batch=1, repeats=3)
    verdict = words.speed_verdict(with_variant(timing=timing).variants[0])
    assert (verdict.text, verdict.tone) == (text, tone)


def test_larger_is_said_as_plainly_as_smaller():
    larger = with_variant(bytes_quantized=9_600_000)
    assert words.size_verdict(larger, larger.variants[0]).text == "1.50× larger"
    assert words.size_verdict(larger, larger.variants[0]).tone == "bad"
    (said,) = words.loss_sentences(larger, larger.variants[0])
    assert "size (1.50× larger)" in said and "1.50× larger" in losses_of(larger)["Larger"]


def test_sentences_list_everything_that_got_worse():
    report = make_report()
    text = " ".join(summary_sentences(report, report.variants[0])).replace("\xa0", " ")
    assert "1.60 MB instead of 6.40 MB in float32: 4.00 times smaller" in text
    assert "speed (2.00× slower); class agreement (98.0 % to 96.0 %)" in text
    assert "FD to the test set (5.00 to 5.50)" in text
    assert "n = 512" in text and "zoo classifier" in text


def test_sentences_do_not_invent_losses():
    good = with_variant(
        timing=Timing(seconds_float=2.0, seconds_quantized=1.0, batch=1, repeats=3),
        distances=(),
        agreement=ClassAgreement(value=0.98, value_float=0.98, net="zoo", n=9),
    )
    text = " ".join(summary_sentences(good, good.variants[0]))
    assert "Worse" not in text and "2.00 times faster" in text and "as many as" in text


def test_terminal_table_says_slower_and_fits_eighty_columns():
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(make_report()))
    text = out.getvalue().replace("\xa0", " ")
    for expected in ("2.00× slower", "4.00× smaller", "W4A8", "W8A8", "1.60 MB", "96.0 %"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


def test_terminal_table_does_not_read_names_as_markup():
    out = io.StringIO()
    report = make_report((make_variant(smooth(0), name="[red]W4[/red]"),), title="[bold]x")
    Console(file=out, width=100).print(summary_table(report))
    assert "[red]W4[/red]" in out.getvalue() and "[bold]x" in out.getvalue()


# --- Data --------------------------------------------------------------------------------


def test_as_dict_is_strict_json_without_pictures():
    report = with_variant(psnr=np.array([np.inf, 30.0, np.nan]))
    tree = json.loads(json.dumps(as_dict(report), allow_nan=False))
    variant = tree["variants"][0]
    assert "float_images" not in tree and "images" not in variant
    assert variant["psnr"] == ["inf", 30.0, "nan"] and float(variant["psnr"][0]) == np.inf
    assert variant["timing"]["speedup"] == 0.5
    assert variant["layers"][0]["shape"] == [64, 192]
    assert tree["versions"] == {"qjax": "0.1", "jax": "0.10"}
    assert tree["seeds"] == [3, 4, 5]


def test_report_names_everything_that_does_not_fit():
    reference = smooth(0)
    variant = make_variant(reference, images=reference[:2], bytes_quantized=0)
    with pytest.raises(ValueError) as error:
        make_report((variant, variant), seeds=(1, 2), labels=("a",), bytes_float=0)
    for part in ("seeds", "labels", "bytes_float", "different names", "images must be shaped"):
        assert part in str(error.value)
    assert "'W4A8'" in str(error.value) and "bytes_quantized" in str(error.value)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"psnr": np.ones(2)}, "psnr must hold"),
        ({"ssim": np.ones(2)}, "ssim must pair"),
        ({"error_per_step": np.ones((2, 2))}, "non-empty"),
        ({"error_per_step": np.ones(4)}, "one number a timestep, 5; got 4"),
        ({"images": np.zeros((3, 28, 24, 1), np.uint8)}, "floats in"),
        ({"psnr": [1.0, 2.0, 3.0]}, "np.asarray: 'W4A8' psnr"),
    ],
)
def test_variant_that_does_not_fit_raises(changes, match):
    with pytest.raises(ValueError, match=match):
        with_variant(**changes)


def test_report_without_variants_raises():
    with pytest.raises(ValueError, match="at least one"):
        dataclasses.replace(make_report(), variants=())


def test_float_layer_without_a_reason_raises():
    with pytest.raises(ValueError, match="without a reason"):
        dataclasses.replace(make_layers()[1], reason=" ")


def test_fid_needs_inception_features():
    with pytest.raises(ValueError, match="Call it FD"):
        FeatureDistance(name="FID", value=1.0, net="zoo classifier", n=10)
    FeatureDistance(name="FID", value=1.0, net="Inception v3, pool3", n=10)


@pytest.mark.parametrize("share", [-0.1, 98.0])
def test_agreement_in_percent_raises(share):
    with pytest.raises(ValueError, match="Divide percent"):
        ClassAgreement(value=share, value_float=0.5, net="zoo", n=1)


def test_time_of_zero_raises():
    with pytest.raises(ValueError, match="Leave `timing` out"):
        Timing(seconds_float=0.0, seconds_quantized=1.0, batch=1, repeats=1)


# --- Pictures and chart ------------------------------------------------------------------


def test_grid_holds_every_picture_enlarged_in_whole_blocks():
    report = make_report()
    drawn = np.array(image_grid(report, tile=48))
    for images in (report.float_images, *(variant.images for variant in report.variants)):
        for image in images:
            block = np.array(picture(image).resize((48, 56), Image.Resampling.NEAREST))
            starts = np.argwhere((drawn == block[0, 0]).all(axis=-1))
            assert any(
                drawn[y : y + 56, x : x + 48].shape == block.shape
                and (drawn[y : y + 56, x : x + 48] == block).all()
                for y, x in starts
            )


def test_grid_keeps_long_names_inside_and_is_deterministic(tmp_path):
    report = make_report(labels=("a very long prompt about a coat " * 5, "靴", "bag"))
    first, second = image_grid(report), image_grid(report)
    assert first.tobytes() == second.tobytes()
    save_png(first, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as read_back:
        assert read_back.size == first.size
    margin = np.array(first)[:, :10]
    assert (margin == 255).all()


def test_large_pictures_are_not_scaled():
    report = make_report(shape=(1, 200, 160, 3), labels=(), seeds=(0,))
    width, height = image_grid(report).size
    assert 5 * 160 < width < 5 * 160 + 260 and 200 < height < 400


def test_error_colours_are_dark_at_zero_and_brightest_from_the_ceiling_on():
    reference = np.zeros((1, 4, 3), np.float32)
    image = reference + np.array([0.0, 0.1, 0.2, 0.9], np.float32)[None, :, None]
    image[0, 3] = [0.9, 0.9, 0.9]
    drawn = np.array(error_picture(image, reference, ceiling=0.2))
    np.testing.assert_array_equal(drawn, [[0, 127, 254, 254]])
    lightness = heat_palette()[:255].astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) >= -1).all() and lightness[-1] - lightness[0] > 200


def test_error_ceiling_is_shared_round_and_never_below_one_level():
    reference = np.zeros((2, 10, 10, 1), np.float32)
    assert error_ceiling([reference + 0.1234, reference], reference) == pytest.approx(0.13)
    assert error_ceiling([reference], reference) == pytest.approx(0.004)
    assert error_ceiling([reference + np.nan], reference) == pytest.approx(0.004)


def test_values_outside_the_range_are_clipped_when_drawn():
    drawn = np.array(picture(np.array([[[-0.5], [0.5], [1.5]]], np.float32)))
    np.testing.assert_array_equal(drawn[0, :, 0], [0, 128, 255])


def test_chart_has_a_line_a_variant_and_a_tooltip_a_step():
    page = Page(render_html(make_report()))
    assert len(page.all("polyline")) == 2
    assert len(page.all("circle")) == 2 * 5
    assert "W4A8, step 1, timestep 801: 0.0100" in page.words
    chart = next(a for a in page.all("svg") if "aria-label" in a)
    assert "W4A8 ends at 0.0500" in chart["aria-label"]


def test_chart_goes_logarithmic_when_errors_span_decades():
    assert _range([np.array([0.1, 0.5])]) == (0.0, 0.5, False)
    low, high, logarithmic = _range([np.array([0.0, 0.003, 0.9])])
    assert logarithmic and (low, high) == pytest.approx((0.002, 1.0))
    assert _range([np.zeros(3)]) == (0.0, 1.0, False)


@pytest.mark.parametrize("largest", [1e-6, 0.0123, 0.3, 0.5, 1.0, 7.7, 1234.0])
def test_linear_ticks_enclose_the_errors(largest):
    ticks = _linear_ticks(largest)
    assert ticks[0] == 0 and ticks[-1] >= largest * (1 - 1e-9) and 3 <= len(ticks) <= 7


@pytest.mark.parametrize("low, high", [(0.001, 0.05), (1e-9, 1.0), (0.02, 0.5), (0.1, 100.0)])
def test_log_ticks_lie_between_the_ends_and_are_few(low, high):
    ticks = _log_ticks(low, high)
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 20, 50, 250, 1000])
def test_step_ticks_start_at_one_and_end_at_the_last(steps):
    ticks = _step_ticks(steps)
    assert ticks[0] == 1 and ticks[-1] == steps and len(ticks) <= 8


def test_names_of_recipes_go_on_several_lines():
    font = report_pictures._font(12)
    width, name = font.getlength("ptqd_w4a8_"), "q_dit_s2p_ptqd_w4a8"
    lines = report_pictures._lines(f"error of {name}", width=width, font=font, most=3)
    assert lines[-1] == "ptqd_w4a8" and all(font.getlength(line) <= width for line in lines)
    assert "".join(lines) == f"error of {name}"
    (line,) = report_pictures._lines(name, width=width, font=font, most=1)
    assert line.endswith("…") and font.getlength(line) <= width
