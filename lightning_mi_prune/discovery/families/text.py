"""Hugging Face text encoders, a table of names each."""

from __future__ import annotations

from lightning_mi_prune.discovery.families.names import FamilyNames, HeadNames, LayerNames

__all__ = [
    "TEXT",
]

_TOKEN = HeadNames(reads=("classifier",))
_QUESTION = HeadNames(reads=("qa_outputs",))
_DENSE = HeadNames(pooler=("classifier.dense", "classifier.out_proj"))
_NOTHING = HeadNames()  # the encoder alone, or its own pooler below a head

_BERT_LAYER = LayerNames(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    skips=("attention.self.query", "intermediate.dense"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)

_BERT_LM = HeadNames(
    transform=(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
    )
)

_BERT = FamilyNames(
    classes="Bert",
    layer=_BERT_LAYER,
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": HeadNames(pooler=("bert.pooler.dense", "classifier")),
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForMaskedLM": _BERT_LM,
        "ForPreTraining": _BERT_LM,
        "ForMultipleChoice": _NOTHING,
        "ForNextSentencePrediction": _NOTHING,
    },
)


def _roberta(classes: str) -> FamilyNames:
    return FamilyNames(
        classes=classes,
        layer=_BERT_LAYER,
        heads={
            "Model": _NOTHING,
            "ForSequenceClassification": _DENSE,
            "ForTokenClassification": _TOKEN,
            "ForQuestionAnswering": _QUESTION,
            "ForMaskedLM": HeadNames(
                transform=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
            ),
            "ForMultipleChoice": _NOTHING,
        },
    )


_ELECTRA = FamilyNames(
    classes="Electra",
    layer=_BERT_LAYER,
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": _DENSE,
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForPreTraining": HeadNames(reads=("discriminator_predictions.dense",), square=True),
        "ForMaskedLM": HeadNames(
            transform=(
                "generator_predictions.dense",
                "generator_predictions.LayerNorm",
                "generator_lm_head",
            )
        ),
    },
    projection="embeddings_project",
    config_aliases=("embedding_size",),
)

_DISTILBERT = FamilyNames(
    classes="DistilBert",
    layer=LayerNames(
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        skips=("attention.q_lin", "ffn.lin1"),
        norms=("sa_layer_norm", "output_layer_norm"),
        heads="n_heads",
        width=None,
        hidden="dim",
    ),
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": HeadNames(pooler=("pre_classifier", "classifier")),
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForMaskedLM": HeadNames(
            transform=("vocab_transform", "vocab_layer_norm", "vocab_projector")
        ),
    },
    stack=("transformer.layer",),
    hidden="dim",
    ffn_width="hidden_dim",
    head_count="n_heads",
)

# One table of position biases, a column a head, is made for all layers: a layer that lost heads
# takes the columns of the others out of it, and the config cannot say so.
_MPNET = FamilyNames(
    classes="MPNet",
    layer=LayerNames(
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        out="attention.attn.o",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        skips=("attention.attn.q", "intermediate.dense"),
        norms=("attention.LayerNorm", "output.LayerNorm"),
        rescales=True,
        selects="position_bias",
    ),
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": _DENSE,
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForMaskedLM": HeadNames(
            transform=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
        ),
        "ForMultipleChoice": _NOTHING,
    },
    head_count=None,
)

# Queries and keys may pass the relative positions too, a stream beside that of the tokens: what
# they are multiplied with is then another thing in each place, and no one turn fits all.
_DEBERTA = FamilyNames(
    classes="DebertaV2",
    layer=LayerNames(
        attention="attention.self",
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        positions=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        out="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        skips=("attention.self", "intermediate.dense"),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        turns=False,
    ),
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": HeadNames(pooler=("pooler.dense", "classifier")),
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForMaskedLM": HeadNames(
            transform=(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder",
            )
        ),
    },
    embedding_norm=None,
    projection="embeddings.embed_proj",
    positions="encoder.rel_embeddings",
    mixer="encoder.conv.conv",
    norms=("embeddings.LayerNorm", "encoder.LayerNorm", "encoder.conv.LayerNorm"),
    pooler=None,
    config_aliases=("pooler_hidden_size",),
)

# One group of layers runs many times: one set of groups, whose consumers are called many times.
_ALBERT = FamilyNames(
    classes="Albert",
    layer=LayerNames(
        attention="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        out="attention.dense",
        ffn_in="ffn",
        ffn_out="ffn_output",
        skips=("attention.query", "ffn"),
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        turns=False,
        hidden="hidden_size",
        dropout="attention.output_dropout",
        norm="attention.LayerNorm",
    ),
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": HeadNames(pooler=("albert.pooler", "classifier")),
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForMaskedLM": HeadNames(reads=("predictions.dense",)),
        "ForMultipleChoice": _NOTHING,
    },
    stack=("encoder.albert_layer_groups", "albert_layers"),
    repeats=True,
    projection="encoder.embedding_hidden_mapping_in",
    pooler="pooler",
)

TEXT: dict[str, FamilyNames] = {
    "bert": _BERT,
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "electra": _ELECTRA,
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "deberta-v2": _DEBERTA,
    "albert": _ALBERT,
}
