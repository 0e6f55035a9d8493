"""What is drawn is what was given: looked at as data, since nobody looks at a test's picture."""

import io
import itertools

import numpy as np
import pytest

from llama_eqx.tracking.pictures import (
    plot_attention,
    plot_attention_entropy,
    plot_logit_lens,
    plot_residual,
    plot_traces,
)


def saved(figure):
    """The figure's first axes, after it has been drawn without a warning."""
    figure.savefig(content := io.BytesIO(), format="png", dpi=30)
    assert content.getvalue()[:4] == b"\x89PNG"
    return figure.axes[0]


def test_entropy_is_shown_as_a_share_of_the_most():
    everything = np.broadcast_to(np.log(np.arange(1, 9)), (2, 3, 4, 8)).copy()
    everything[1, :, 2] = 0
    axes = saved(plot_attention_entropy(everything))
    wanted = np.ones((2, 4))
    wanted[1, 2] = 0
    np.testing.assert_allclose(axes.images[0].get_array(), wanted, atol=1e-6)
    assert [text.get_text() for text in axes.texts] == [f"{share:.2f}" for share in wanted.ravel()]


def test_the_residual_by_layer_and_position():
    axes = saved(
        plot_residual(np.full((3, 5, 16), 10.0) * np.array([1, 10, 100])[:, None, None], ["a", "b\n", "$c$", " 世", "long enough to cut"])
    )
    np.testing.assert_allclose(axes.images[0].get_array(), np.array([[1], [2], [3]]) * np.ones(5), rtol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embedding", "0", "1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b⏎", r"\$c\$", "·□", "long·enough…"]


def test_special_tokens_are_shown_by_their_ids():
    figures = plot_traces({"residual": np.ones((2, 1, 2, 4))}, [7, 8], lambda ids: "" if ids == [7] else "x")
    assert [label.get_text() for label in saved(figures["residual"]).get_xticklabels()] == ["⟨7⟩", "x"]


def test_the_lens_is_bold_where_a_layer_agrees_with_the_last():
    axes = saved(plot_logit_lens(np.array([[1, 2], [1, 3]]), np.log([[0.9, 0.1], [0.5, 0.6]]), [["x", "y"], ["x", "z"]], ["p", "q"]))
    assert [(text.get_text(), text.get_weight()) for text in axes.texts] == [("x", "bold"), ("y", "normal"), ("x", "bold"), ("z", "bold")]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.9, 0.5], [0.1, 0.6]], rtol=1e-6)
    assert [text.get_position() for text in axes.texts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embedding", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["p", "q"]


def test_of_many_tokens_the_lens_fits_a_page():
    words = [["return"] * 32] * 5
    assert plot_logit_lens(np.ones((5, 32), int), np.zeros((5, 32)), words, words[0]).get_figwidth() < 10


@pytest.mark.parametrize("seq", [32, 48])
def test_tokens_beside_attention_do_not_run_together(seq):
    figure = plot_attention(np.full((4, seq, seq), 1 / seq), ["connection"] * seq)
    figure.draw_without_rendering()
    for labels, side in ((figure.axes[0].get_xticklabels(), 0), (figure.axes[0].get_yticklabels(), 1)):
        ends = sorted((label.get_window_extent().min[side], label.get_window_extent().max[side]) for label in labels)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("tokens", [(), ["a", "b", "c"]])
def test_a_panel_for_each_head(tokens):
    weights = np.tril(np.ones((6, 3, 3))) / np.arange(1, 4)[:, None]
    figure = plot_attention(weights, tokens)
    saved(figure)
    assert [axes.get_title() for axes in figure.axes[:6]] == [f"head {head}" for head in range(6)]
    np.testing.assert_allclose(figure.axes[5].images[0].get_array(), weights[5], rtol=1e-6)
