-- features(sae, latent): a latent with its best label, its scores and its statistics: what users query.
-- The best label has the highest score of those whose status is ok, and of equals the one whose labeller stands first in label.labellers;
-- a latent without any keeps its row and says why in label_status.
CREATE TABLE features AS
WITH best AS (
    SELECT *
    FROM labels
    QUALIFY row_number() OVER (PARTITION BY sae, latent ORDER BY status = 'ok' DESC, score DESC NULLS LAST, place, labeller) = 1
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
    best.labeller,
    best.status AS label_status,
    latents.ms,
    latents.ms_low,
    latents.ms_high,
    comparisons.ms_floor,
    comparisons.judge,
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
    latents.top_classes
FROM latents
LEFT JOIN best ON best.sae = latents.sae AND best.latent = latents.latent
LEFT JOIN comparisons ON comparisons.sae = latents.sae AND comparisons.dictionary = 'sae'
ORDER BY latents.sae, latents.latent;

COMMENT ON COLUMN features.label IS 'the name with the highest score; null: no labeller found one, see label_status';
COMMENT ON COLUMN features.label_score IS 'balanced accuracy of the label at picking held-out firing images; null: no label, too few images fire it, or all do';
COMMENT ON COLUMN features.labeller IS 'what made the label; null: none was asked';
COMMENT ON COLUMN features.label_status IS 'ok, unparsed, refused, failed, over_budget or too_few_examples; null: no labeller was asked';
