"""What is served: the models, their input fields, versions and views.

Belongs here: reading the loaded models. Does not belong here: predicting, changing what serves (the registry's alias does that).
"""

from fastapi import APIRouter

from serving_app.deps import NO_PARAMETERS, Serving, ServingDep
from serving_app.openapi import example_inputs, input_schema
from serving_app.predictor import unknown_model
from serving_app.router import Slot
from serving_app.schemas import (
    ModelDetail,
    ModelList,
    ModelSummary,
    RefusedInRole,
    RefusedVersion,
    ServedVersion,
    Traffic,
    VariantShare,
    ViewDetail,
    problems,
)

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[NO_PARAMETERS])


@router.get("", summary="The models served here", responses=problems(422))
async def list_models(serving: ServingDep) -> ModelList:
    return ModelList(models=[_summary(serving, slot) for slot in serving.router])


@router.get("/{model}", summary="One model: its fields, versions and feature views", responses=problems(404, 422))
async def show_model(model: str, serving: ServingDep) -> ModelDetail:
    slot = serving.router.slot(model)
    if slot is None:
        raise unknown_model(serving.router, serving.watcher, model)
    contract = slot.current.contract
    return ModelDetail(
        **dict(_summary(serving, slot)),
        threshold=contract.threshold,
        quantiles=list(contract.quantile_names),
        input_schema=input_schema(contract),
        example={"inputs": example_inputs(contract)},
        features=[f.name for f in contract.features],
        views=[
            ViewDetail(name=v.name, join_keys=list(v.join_keys), ttl_s=v.ttl_s, on_stale=v.on_stale, features=list(v.features))
            for v in contract.views
        ],
        versions=[
            ServedVersion(
                version=handle.version,
                role=role,
                contract_digest=handle.digest,
                training_set_hash=handle.contract.training_set_hash,
                device=handle.device,
            )
            for role, handle in slot.held()
        ],
    )


def _summary(serving: Serving, slot: Slot) -> ModelSummary:
    handle = slot.current
    refusal = serving.watcher.refusals.get(handle.name)
    return ModelSummary(
        name=handle.name,
        description=handle.contract.description,
        task=handle.contract.task,
        version=handle.version,
        previous_version=slot.previous.version if slot.previous else None,
        contract_digest=handle.digest,
        refused=RefusedVersion(version=refusal.ref.version, step=refusal.step, reason=refusal.reason) if refusal else None,
        traffic=_traffic(serving, slot),
    )


def _traffic(serving: Serving, slot: Slot) -> Traffic:
    model = slot.current.name
    refused = [r for (name, _), r in sorted(serving.watcher.side_refusals.items()) if name == model]
    return Traffic(
        variants=[
            VariantShare(variant=s.choice.variant, version=s.choice.handle.version, percent=round(s.percent, 6))
            for s in serving.router.shares(model)
        ],
        shadow_version=slot.shadow.version if slot.shadow else None,
        shadow_share=slot.rules.shadow_share,
        sticky_on=list(serving.router.sticky_fields(model)),
        refused=serving.watcher.rule_faults.get(model),
        refused_versions=[RefusedInRole(role=r.role, version=r.ref.version, step=r.step, reason=r.reason) for r in refused],
    )
