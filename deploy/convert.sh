# Converts the model of the settings for the engines that are named, into models/, and puts into /kept what an image
# keeps of a checkpoint: its SHA-256 and the labels.
set -eu
for engine; do
    DEVICE=cpu ENGINE=$engine /opt/venv/bin/python -m app prepare
done
# int8 that was made on a processor with VNNI cannot be served on one without, where PRECISION=auto then serves fp32.
if grep -qs '"vnni": true' models/bundles/*/manifest.json && grep -qs '"chosen": "int8"' models/bundles/*/manifest.json; then
    DEVICE=cpu ENGINE=openvino PRECISION=fp32 /opt/venv/bin/python -m app prepare
fi
rm -rf models/weights
chmod -R g=u models
mkdir /kept
if [ "${MODEL_PATH:-}" ]; then sha256sum "$MODEL_PATH" >"/kept/${MODEL_PATH##*/}.sha256"; fi
if [ "${LABELS_PATH:-}" ]; then cp "$LABELS_PATH" /kept; fi
