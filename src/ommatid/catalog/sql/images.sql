-- images(image): an image of the data set, with its thumbnail; its encoded bytes are only in the artefact.
-- $resize is [shorter side] or [height, width], and $crop is [height, width], as in the model's preprocessing; both may be null.
CREATE TABLE images AS
WITH found AS (
    SELECT
        * EXCLUDE (encoded),
        $crop::DOUBLE[] AS crop,
        CASE len($resize::DOUBLE[])
            WHEN 2 THEN $resize::DOUBLE[]
            WHEN 1 THEN [x * ($resize::DOUBLE[])[1] / least(width, height) FOR x IN [height, width]]
        END AS resized
    FROM read_parquet($images)
)
SELECT
    * EXCLUDE (crop, resized),
    if(resized IS NULL, NULL, least(1, crop[2] / resized[2]))::FLOAT AS seen_width,
    if(resized IS NULL, NULL, least(1, crop[1] / resized[1]))::FLOAT AS seen_height
FROM found
ORDER BY image;

-- without it, reading one thumbnail reads those of 2,048 images
CREATE INDEX images_by_number ON images (image);

COMMENT ON COLUMN images.seen_width IS 'share of the width, around the centre, that the model sees and heat maps cover; null if unknown';
COMMENT ON COLUMN images.seen_height IS 'share of the height, around the centre, that the model sees and heat maps cover; null if unknown';
