-- features(sae, latent): a latent with its best label, its scores and its statistics; the relation to query first.
-- The best label is the one with the highest score among those with status ok; ties go to the labeller listed first in label.labellers.
-- A label by people comes before all others, whatever its score: what a person corrects stays corrected.
-- A latent without a label has a row too, and label_status gives the reason.
CREATE TABLE features AS
WITH best AS (
    SELECT *
    FROM labels
    QUALIFY row_number() OVER (
        PARTITION BY sae, latent
        ORDER BY status = 'ok' DESC, starts_with(labeller, 'human') DESC, score DESC NULLS LAST, place, labeller
    ) = 1
)
SELECT
    latents.sae,
    latents.latent,
    best.label,
    best.score AS label_score,
    best.control_score,
    best.random_score,
    best.auroc,
    best.correlation,
    best.precision,
    best.precision_chance,
    best.recall,
    best.recall_chance,
    best.labeller,
    best.status AS label_status,
    latents.ms,
    latents.ms_low,
    latents.ms_high,
    comparisons.ms_floor,
    comparisons.judge,
    coalesce(effects.status, 'untested') AS causal,
    effects.reason AS causal_reason,
    effects.effect,
    effects.effect_low,
    effects.effect_high,
    effects.best_control,
    effects.control_causal,
    effects.dose,
    effects.scale,
    effects.attribution,
    latents.density,
    latents.is_dead,
    latents.is_dense,
    latents.is_rare,
    latents.mean_act,
    latents.max_act,
    latents.n_images,
    latents.purity,
    latents.label_entropy,
    latents.lca_depth,
    latents.uniqueness,
    latents.duplicate_of,
    latents.top_classes,
    -- every other column of latents, in the order of its declaration, except dead_in_training and purity_64
    latents.* EXCLUDE (
        sae, latent, ms, ms_low, ms_high, density, is_dead, is_dense, is_rare, mean_act, max_act, n_images, purity,
        label_entropy, lca_depth, uniqueness, duplicate_of, top_classes, dead_in_training, purity_64
    )
FROM latents
LEFT JOIN best ON best.sae = latents.sae AND best.latent = latents.latent
LEFT JOIN read_parquet($effects) AS effects ON effects.sae = latents.sae AND effects.latent = latents.latent
LEFT JOIN comparisons ON comparisons.sae = latents.sae AND comparisons.dictionary = 'sae'
ORDER BY latents.sae, latents.latent;

-- without it, looking up a few latents reads the labels of thousands
CREATE INDEX features_by_latent ON features (latent);

COMMENT ON COLUMN features.label IS 'the label by people, or the one with the highest score if they gave none; null if no labeller found one, see label_status';
COMMENT ON COLUMN features.label_score IS 'balanced accuracy of the label at predicting on which held-out images the latent fires; null if there is no label, or the latent fires on too few or on all images';
COMMENT ON COLUMN features.labeller IS 'labeller that made the label; null if no labeller was run';
COMMENT ON COLUMN features.label_status IS 'ok, unparsed, refused, failed, over_budget or too_few_examples; null if no labeller was run';
COMMENT ON COLUMN features.causal IS 'causal, reads_only, breaks_model or untested: whether setting the latent changes the model''s output as the latent promises, and more than under any control';
COMMENT ON COLUMN features.causal_reason IS 'why the latent is untested; null if it is tested';
