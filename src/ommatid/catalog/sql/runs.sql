-- runs(sae): the lineage of an SAE, its headline numbers, and the decision about it; a published catalogue also has a row for each SAE
-- of an earlier decision.
CREATE TABLE runs AS
SELECT
    run.sae,
    run.name,
    run.created_at,
    run.model,
    run.hookpoint,
    run.target,
    run.variant,
    run.k,
    run.git_commit,
    run.git_dirty,
    run.dvc_experiment,
    run.dvc_lock,
    run.mlflow_run_id,
    run.prefect_flow_run_id,
    run.images_digest,
    run.activations_digest,
    run.sae_digest,
    run.params::JSON AS params,
    headline.fvu,
    headline.l0,
    headline.dead,
    headline.ms,
    headline.ms_floor,
    headline.judge,
    downstream.downstream_loss,
    downstream.downstream_kl,
    coalesce(counted.n_latents, 0)::INTEGER AS n_latents,
    coalesce(counted.n_labelled, 0)::INTEGER AS n_labelled,
    counted.label_score,
    counted.control_score,
    counted.beats_control,
    NULL::VARCHAR AS decision,
    NULL::TIMESTAMP AS decided_at,
    NULL::VARCHAR AS reason
FROM read_parquet($runs) AS run
LEFT JOIN comparisons AS headline ON headline.sae = run.sae AND headline.dictionary = 'sae'
LEFT JOIN zero_shot AS downstream ON downstream.sae = run.sae AND downstream.spliced = 'sae'
LEFT JOIN (
    SELECT
        sae,
        count(*) AS n_latents,
        count(label) AS n_labelled,
        avg(label_score) AS label_score,
        avg(control_score) AS control_score,
        avg((label_score > control_score)::INTEGER) AS beats_control
    FROM features
    GROUP BY sae
) AS counted ON counted.sae = run.sae
ORDER BY run.sae;

COMMENT ON COLUMN runs.name IS 'name of the SAE in its training, and of its folder in data/sae, data/evaluation, data/labels and data/interventions';
COMMENT ON COLUMN runs.created_at IS 'when the catalogue of the SAE was built, UTC';
COMMENT ON COLUMN runs.model IS 'the model that the SAE explains';
COMMENT ON COLUMN runs.hookpoint IS 'where the activations were captured';
COMMENT ON COLUMN runs.target IS 'hookpoint whose activations a transcoder decodes; null if the SAE decodes the activations that it encodes';
COMMENT ON COLUMN runs.variant IS 'variant of the SAE, such as batch_topk';
COMMENT ON COLUMN runs.k IS 'number of latents meant to fire per token; with a fixed penalty weight, the actual number can differ';
COMMENT ON COLUMN runs.git_commit IS 'commit of the code that trained the SAE; null without git';
COMMENT ON COLUMN runs.git_dirty IS 'whether tracked files differed from that commit; null without git';
COMMENT ON COLUMN runs.dvc_experiment IS 'DVC experiment; null if made in the checkout, or without DVC';
COMMENT ON COLUMN runs.dvc_lock IS 'checksum of dvc.lock; null without DVC';
COMMENT ON COLUMN runs.mlflow_run_id IS 'MLflow run with the training curves; null if no tracking server answered';
COMMENT ON COLUMN runs.prefect_flow_run_id IS 'Prefect flow run that trained the SAE; null if trained without Prefect';
COMMENT ON COLUMN runs.images_digest IS 'sha256 of the manifest of the images';
COMMENT ON COLUMN runs.activations_digest IS 'sha256 of the manifest of the activations that the SAE was trained on';
COMMENT ON COLUMN runs.sae_digest IS 'sha256 of the manifest of the SAE';
COMMENT ON COLUMN runs.params IS 'params of all stages, by section';
COMMENT ON COLUMN runs.downstream_loss IS 'cross-entropy of zero-shot classification with x̂ in the place of x, less that of the plain model, in nats; null if it was not measured';
COMMENT ON COLUMN runs.downstream_kl IS 'mean divergence of the probabilities of the classes with x̂ in the place of x from those of the plain model, in nats; null if it was not measured';
COMMENT ON COLUMN runs.n_latents IS 'number of latents of the SAE';
COMMENT ON COLUMN runs.n_labelled IS 'number of latents with a label';
COMMENT ON COLUMN runs.label_score IS 'mean label score of the features that have one; null if none has';
COMMENT ON COLUMN runs.control_score IS 'mean score of another latent''s label on the same images, as a baseline for label_score; null if no feature has one';
COMMENT ON COLUMN runs.beats_control IS 'share of labelled features whose label scores higher than another latent''s label; null if no feature has both scores';
COMMENT ON COLUMN runs.decision IS 'champion or challenger, by the retrain flow; null if there is no decision, or another SAE of the training was better';
COMMENT ON COLUMN runs.decided_at IS 'time of the decision, UTC; null if there is no decision';
COMMENT ON COLUMN runs.reason IS 'the numbers behind the decision; null if there is no decision';
