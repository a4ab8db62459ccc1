"""Tables of names of Hugging Face text encoders."""

from __future__ import annotations

from lightning_mi_prune.discovery.families.names import FamilyNames, HeadNames, LayerNames

__all__ = [
    "TEXT",
]

_TOKEN = HeadNames(consumers=("classifier",))
_QUESTION = HeadNames(consumers=("qa_outputs",))
_DENSE = HeadNames(pooler=("classifier.dense", "classifier.out_proj"))
_NOTHING = HeadNames()  # no consumers besides the pooler of the encoder

_BERT_LAYER = LayerNames(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    residual_inputs=("attention.self.query", "intermediate.dense"),
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
        "ForPreTraining": HeadNames(consumers=("discriminator_predictions.dense",), square=True),
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
        residual_inputs=("attention.q_lin", "ffn.lin1"),
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

# One table of position biases, with a column per head, is computed for all layers: a layer that
# lost heads selects its columns, which no config can express.
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
        residual_inputs=("attention.attn.q", "intermediate.dense"),
        norms=("attention.LayerNorm", "output.LayerNorm"),
        rescaled=True,
        unit_argument="position_bias",
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

# Queries and keys are also multiplied with those of relative positions, so no rotation of heads
# leaves all products unchanged.
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
        residual_inputs=("attention.self", "intermediate.dense"),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        rotatable=False,
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

# Layers run many times: there is one set of groups, whose consumers are called many times.
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
        residual_inputs=("attention.query", "ffn"),
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        rotatable=False,
        hidden="hidden_size",
        dropout="attention.output_dropout",
        norm="attention.LayerNorm",
    ),
    heads={
        "Model": _NOTHING,
        "ForSequenceClassification": HeadNames(pooler=("albert.pooler", "classifier")),
        "ForTokenClassification": _TOKEN,
        "ForQuestionAnswering": _QUESTION,
        "ForMaskedLM": HeadNames(consumers=("predictions.dense",)),
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
