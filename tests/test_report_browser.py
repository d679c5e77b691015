"""The report and the demo's index, opened from disk in headless Chromium.

Needs Chromium and its driver (`apt-get install chromium chromium-driver`) and selenium. Where one
of them is missing the tests skip, and the run says NOT TESTED.
"""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qjax.report import (
    ClassAgreement,
    ComparisonReport,
    FeatureDistance,
    LayerResult,
    Timing,
    VariantResult,
    save_html,
)
from qjax.report_index import Entry, save_index

PHONE, TABLET, DESKTOP = (390, 844), (768, 1024), (1440, 900)
PAGES = ("report", "index")
# What a page asks of a browser is for the browser to do: no updates, no accounts, no downloads.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)


def layers(count):
    quantized = [
        LayerResult(
            path=f"transformer_blocks_{i}/attention/to_queries_keys_and_values/kernel",
            kind="dense",
            shape=(1152, 3456),
            weight_bits=4,
            act_bits=8,
            group_size=128,
            bytes_float=7_962_624,
            bytes_quantized=2_052_864,
            weight_sqnr=20.0 + i,
            output_sqnr=40.0 - i,
        )
        for i in range(count)
    ]
    bias = LayerResult(
        path="a_layer_with_one_very_long_name_that_has_nowhere_to_break_and_goes_on/bias",
        kind="bias",
        shape=(1152,),
        weight_bits=None,
        bytes_float=2304,
        bytes_quantized=2304,
        reason="not a layer's kernel",
    )
    return (*quantized, bias)


def variant(name, images, **changes):
    rng = np.random.default_rng(len(name))
    fields = {
        "name": name,
        "how": "4-bit weights (groups of 128, else one scale per channel), 8-bit activations",
        "images": images,
        "bytes_quantized": 1_060_000,
        "psnr": rng.uniform(15, 40, 64),
        "ssim": rng.uniform(0.5, 1, 64),
        "error_per_step": np.linspace(0.01, 0.2, 50),
        "timing": Timing(seconds_float=0.9, seconds_quantized=1.2, batch=64, repeats=7),
        "distances": (
            FeatureDistance(
                name="FD", value=9.5, value_float=8.2, net="a net", reference="real ones", n=64
            ),
        ),
        "agreement": ClassAgreement(value=0.89, value_float=0.92, net="a net", n=64),
        "layers": layers(20),
        "settings": (("Recipe", "w4a8"), ("Groups", "128 weights share one scale")),
        "notes": ("It was made from other weights than those of the float model here.",),
    }
    return VariantResult(**(fields | changes))


def make_report():
    """Three variants; of the first picture the float one is white and the first variant black."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (4, 32, 32, 3)).astype(np.float32)
    images[0] = 1.0
    black = images.copy()
    black[0] = 0.0
    grey = images * 0.5
    return ComparisonReport(
        title="a-model-with-a-name-of-some-length: float and quantized",
        model="a transformer of 675 million numbers that draws pictures of 32 × 32 pixels",
        device="Some Processor 9754 128-Core (CPU, 2 cores, x86_64)",
        sampler="DDIM, 50 steps, guidance 2",
        versions=(("qjax", "0.1"), ("jax", "0.10")),
        seeds=(0, 1, 37, 12),
        labels=("T-shirt", "a very long prompt about a coat in the rain " * 4, "W" * 80, "bag"),
        float_images=images,
        bytes_float=3_740_000,
        variants=(
            variant("w4a8", black),
            variant("q_dit_s2p_ptqd_w4a8", grey, timing=None, bytes_quantized=4_000_000),
            variant("w2", np.full_like(images, np.nan), psnr=np.full(64, np.nan), distances=()),
        ),
        worst_shown=2,
        notes=("FD between two halves of the real test set is 0.20 (n = 5,000 each).",),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, report = tmp_path_factory.mktemp("pages"), make_report()
    save_html(report, folder / "report.html")
    links = (("the whole report, with pictures", "report.html"),)
    entry = Entry(report=report, links=links, extra=(("files on disk", "4 MB", "1", "4", "1"),))
    save_index(folder / "index.html", "qjax demo", ("What this is.", "What it says."), (entry,))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = {
        "Chromium": next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None),
        "its driver": shutil.which("chromedriver"),
    }
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"NOT TESTED: the report's pages in a browser; no {' and no '.join(missing)}")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        pytest.skip("NOT TESTED: the report's pages in a browser; no selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["Chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs["its driver"]))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, folder):
    """Opens a page: `show("report", size=PHONE, theme="dark")`."""

    def show(page="report", *, size=DESKTOP, theme="light", media="screen", script=True):
        width, height = size
        say = browser.execute_cdp_cmd
        say("Emulation.setScriptExecutionDisabled", {"value": not script})
        say(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": theme}
        say("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get((folder / f"{page}.html").as_uri())
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser")]


def events(browser):
    """What the browser's network did since the page was opened."""
    return [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]


def requests(browser):
    """Addresses that were asked for."""
    return [
        event["params"]["request"]["url"]
        for event in events(browser)
        if event["method"] == "Network.requestWillBeSent"
    ]


def stage_split(browser):
    """Share of the slider's picture, from the left, that shows white, the float model's."""
    stage = browser.find_element("css selector", ".stage")
    shot = np.array(Image.open(io.BytesIO(stage.screenshot_as_png)).convert("L"))
    row = shot[shot.shape[0] // 4]  # away from the handle and the names
    return float((row[4:-4] > 128).mean())


# --- Tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_page_opens_without_a_complaint_and_asks_the_network_for_nothing(show, folder, page):
    browser = show(page)
    assert complaints(browser) == []
    asked = [url for url in requests(browser) if not url.startswith("data:")]
    assert asked == [(folder / f"{page}.html").as_uri()]


def test_policy_refuses_what_would_load_or_run(show):
    browser = show()
    refused = browser.execute_async_script(
        """
        const done = arguments[0], refused = [];
        addEventListener("securitypolicyviolation", e => refused.push(e.effectiveDirective));
        const picture = new Image();
        picture.src = "https://stranger.invalid/x.png";
        const script = document.createElement("script");
        script.textContent = "window.stranger = true";
        document.body.append(picture, script);
        setTimeout(() => done([refused.sort(), window.stranger === undefined]), 100);
        """
    )
    assert refused == [["img-src", "script-src-elem"], True]
    blocked = [
        event["params"].get("blockedReason")
        for event in events(browser)
        if event["method"] == "Network.loadingFailed"
    ]
    assert blocked == ["csp"]


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_is_drawn_and_has_words(show, page):
    browser = show(page)
    images = browser.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.alt])"
    )
    assert len(images) >= 4
    assert all(width > 0 and height > 0 and alt for width, height, alt in images)


@pytest.mark.parametrize("size", [PHONE, TABLET, DESKTOP], ids=["phone", "tablet", "desktop"])
@pytest.mark.parametrize("page", PAGES)
def test_layout_is_readable(show, page, size):
    browser = show(page, size=size)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = browser.execute_script(
        """
        const seen = e => e.getClientRects().length > 0;
        const name = e => e.tagName + "." + e.getAttribute("class") + " "
          + (e.textContent || "").slice(0, 30);
        const scroller = e => e.closest(".scroll, .seed, .visually-hidden");
        const words = [...document.querySelectorAll("body *")].filter(e => seen(e)
          && !e.matches("script, style")
          && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
        return {
          wide: document.documentElement.scrollWidth - innerWidth,
          outside: words.filter(e => !scroller(e) && (e.getBoundingClientRect().right > innerWidth
            || e.getBoundingClientRect().left < 0)).map(name),
          small: words.filter(e => parseFloat(getComputedStyle(e).fontSize) < 14).map(name),
          taps: [...document.querySelectorAll("a, button, summary, input")].filter(e => seen(e)
            && (e.getBoundingClientRect().height < 44 || e.getBoundingClientRect().width < 44))
            .map(name),
          longest: Math.max(...[...document.querySelectorAll("p")].filter(seen)
            .map(p => p.getBoundingClientRect().width / parseFloat(getComputedStyle(p).fontSize))),
        };
        """
    )
    assert found["wide"] <= 0 and found["outside"] == []
    assert found["small"] == [] and found["taps"] == []
    assert found["longest"] < 45  # in ems: about 90 letters a line


CONTRAST = """
  const colour = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, bottom) =>
    [0, 1, 2].map(i => top[i] * top[3] + bottom[i] * (1 - top[3])).concat(1);
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.unshift(colour(getComputedStyle(e).backgroundColor));
    const sheet = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1]
      : [255, 255, 255, 1];
    return layers.reduce((below, layer) => over(layer, below), sheet);
  };
  const light = c => [0, 1, 2].map(i => c[i] / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length
    && !e.matches("script, style")
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
      const style = getComputedStyle(e), back = behind(e);
      const ink = colour(e.matches("text") ? style.fill : style.color);
      const [a, b] = [light(over(ink, back)), light(back)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40)];
    });
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_text_stands_out_from_what_is_behind_it(show, page, theme):
    browser = show(page, theme=theme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(back[4:].split(",")[0]) < 60) == (theme == "dark")
    ratios = browser.execute_script(CONTRAST)
    assert len(ratios) > 20
    assert [pair for pair in ratios if pair[0] < 4.5] == []


def test_mouse_finger_and_keys_move_the_slider_and_what_is_seen(show):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = show()
    slider = browser.find_element("css selector", ".stage input")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    assert stage_split(browser) == pytest.approx(0.5, abs=0.03)

    quarter = slider.size["width"] // 4
    drag = ActionChains(browser, duration=50).move_to_element(slider).click_and_hold()
    drag.move_by_offset(-quarter, 0).release().perform()
    assert stage_split(browser) == pytest.approx(0.25, abs=0.05)

    slider.send_keys(Keys.ARROW_RIGHT * 10)
    assert stage_split(browser) == pytest.approx(0.35, abs=0.05)
    slider.send_keys(Keys.END)
    assert stage_split(browser) > 0.97
    assert slider.get_attribute("aria-valuetext") == "100 % float, 0 % w4a8"

    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", slider)
    at = lambda share: [{"x": box["x"] + share * box["width"], "y": box["y"] + 40}]
    for kind, points in (
        ("touchStart", at(0.95)),
        *(("touchMove", at(share)) for share in (0.8, 0.5, 0.2)),
        ("touchEnd", []),
    ):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert stage_split(browser) == pytest.approx(0.2, abs=0.05)


def test_slider_shows_the_version_and_the_picture_that_are_chosen(show):
    browser = show()
    caption = browser.find_element("css selector", "[data-caption]")
    assert caption.text.startswith("seed 0: T-shirt")
    browser.find_elements("css selector", "[data-variants] button")[1].click()
    assert browser.find_element("css selector", ".tag.right").text == "q_dit_s2p_ptqd_w4a8"
    browser.find_elements("css selector", "[data-seeds] button")[3].click()
    assert caption.text.startswith("seed 12: bag")
    shown, expected = browser.execute_script(
        """
        const stage = [...document.querySelectorAll(".stage img")].map(i => i.src);
        const row = document.querySelectorAll(".seed")[3].querySelectorAll("img.shot");
        return [stage, [row[0].src, row[2].src]];
        """
    )
    assert shown == expected
    pressed = browser.find_elements("css selector", "[aria-pressed=true]")
    assert [button.accessible_name for button in pressed] == ["q_dit_s2p_ptqd_w4a8", "seed 12: bag"]


def test_without_scripts_the_pictures_stand_side_by_side(show):
    browser = show(script=False)
    assert not browser.find_element("css selector", ".needs-script").is_displayed()
    float_, quantized = browser.find_elements("css selector", ".seed img.shot")[:2]
    assert float_.is_displayed() and quantized.is_displayed()
    assert float_.rect["y"] == quantized.rect["y"] and float_.rect["x"] < quantized.rect["x"]


def test_paper_is_light_and_holds_everything(show):
    browser = show(theme="dark", media="print")
    ratios = browser.execute_script(CONTRAST.replace("prefers-color-scheme: dark", "width: 0"))
    assert [pair for pair in ratios if pair[0] < 4.5] == []
    back, table = browser.execute_script(
        "return ['body', '.scroll.tall'].map(css => getComputedStyle(document.querySelector(css)))"
        ".map(style => [style.backgroundColor, style.maxHeight])"
    )
    assert back[0] == "rgb(255, 255, 255)" and table[1] == "none"
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(paper["data"]).startswith(b"%PDF")
    assert (
        browser.execute_script("return document.querySelectorAll('details:not([open])').length")
        == 0
    )
