//! What agents ask of each other, under `/node/`; and the one thing that a host
//! asks that is no node yet. Who may call is settled before (`http/gate.rs`).

use std::collections::BTreeMap;

use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use holdfast_consensus::{RpcError, RpcKind};
use holdfast_core::*;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::time::{Duration, Instant};

use super::enter::{JoinAnswer, JoinRefusal, JoinRequest};
use super::fencing::FenceTestCall;
use super::luns::{LunProbe, LunProbed};
use super::report::Numbered;
use super::routes::Traffic;
use super::succession::Succession;
use super::volumes::{Probe, Probed};
use super::witness;
use super::{Agent, Attempt, CONSOLE_PROTOCOL, Failure, Member, Proposed, coordinator, members};
use crate::http::{ApiError, Peer};

/// Tells where the log of the called ends, as term and index; what either side says
/// of its generation is taken in by the other.
pub const GREET: &str = "/node/greet";
/// Has a proposal agreed on.
pub const PROPOSE: &str = "/node/propose";
/// Takes a node's report.
pub const REPORT: &str = "/node/report";
/// Tells what the coordinator sees.
pub const OBSERVED: &str = "/node/observed";
/// Tells how the quorum stands.
pub const QUORUM: &str = "/node/quorum";
/// Hands the coordination over.
pub const HAND_OVER: &str = "/node/hand-over";
/// Looks at a directory that is to become a volume.
pub const PROBE: &str = "/node/probe-volume";
/// Looks at a LUN that is to become a volume.
pub const PROBE_LUN: &str = "/node/probe-lun";
/// Tells how much I/O went through other nodes.
pub const TRAFFIC: &str = "/node/redirected-traffic";
/// Tries out the power fencing of a third node.
pub const FENCE_TEST: &str = "/node/fence-test";
/// Lets a host join.
pub const JOIN: &str = "/api/v1/join";
/// Looks at a disk that is to become the witness.
pub const PROBE_WITNESS: &str = "/node/probe-witness";
/// For how long candidates are looked for.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(8);
/// A snapshot may travel in one body.
const LONGEST_BODY: usize = 64 << 20;

/// Where a witness is called at the node that hosts it.
pub fn witness_path(witness: NodeId, kind: RpcKind) -> String {
    format!("/node/witness/{witness}/{}", kind.name())
}

/// Where a VM's console is opened at the node that runs it.
pub fn console_path(vm: VmId) -> String {
    format!("/node/vms/{vm}/console")
}

/// Where the source of a migration tells its target that the guest is sent, and never
/// continues at the source.
pub fn continue_path(vm: VmId) -> String {
    format!("/node/vms/{vm}/continue")
}

/// The target's QEMU that is meant, and the figures of its coming.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandoverCall {
    /// The target's epoch.
    pub epoch: Epoch,
    /// By the source's account.
    pub moved: Option<Moved>,
    /// Where the parts of the guest's disks on LUNs are, by the disks' numbers.
    #[serde(default)]
    pub parts: BTreeMap<u32, Vec<Mapped>>,
}

/// What the target answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HandedOver {
    /// It is so.
    Done,
    /// Its QEMU is gone: the guest is lost.
    Gone,
    /// Not yet, or not now: ask again.
    Again(String),
}

#[derive(Clone)]
struct Context {
    agent: Agent,
    member: &'static Member,
}

/// The routes under `/node/`, and [`JOIN`].
pub(super) fn routes(agent: Agent, member: &'static Member) -> Router {
    Router::new()
        .route("/node/consensus/{kind}", post(consensus))
        .route("/node/witness/{id}/{kind}", post(to_witness))
        .route(PROBE_WITNESS, post(probe_witness))
        .route(PROPOSE, post(propose))
        .route(REPORT, post(report))
        .route(OBSERVED, post(observed))
        .route(QUORUM, post(quorum))
        .route(HAND_OVER, post(hand_over))
        .route(PROBE, post(probe))
        .route(PROBE_LUN, post(probe_lun))
        .route(TRAFFIC, post(traffic))
        .route(FENCE_TEST, post(fence_test))
        .route("/node/vms/{vm}/continue", post(go_on))
        .route("/node/vms/{vm}/console", any(console))
        .route(GREET, post(greet))
        .route(JOIN, post(join))
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .with_state(Context { agent, member })
}

async fn greet(State(context): State<Context>) -> Json<(u64, u64)> {
    Json(context.member.consensus.log_end())
}

async fn traffic(State(context): State<Context>) -> Json<BTreeMap<uuid::Uuid, Traffic>> {
    Json(context.agent.traffic_here())
}

async fn consensus(State(context): State<Context>, Path(kind): Path<String>, body: Bytes) -> Response {
    let Some(kind) = RpcKind::from_name(&kind) else { return StatusCode::NOT_FOUND.into_response() };
    answered(context.member.consensus.handle(kind, body).await)
}

async fn to_witness(State(context): State<Context>, Path((id, kind)): Path<(u64, String)>, body: Bytes) -> Response {
    let Some(kind) = RpcKind::from_name(&kind) else { return StatusCode::NOT_FOUND.into_response() };
    answered(context.member.witnesses.handle(NodeId(id), kind, body).await)
}

fn answered(answer: Result<Bytes, RpcError>) -> Response {
    match answer {
        Ok(answer) => answer.into_response(),
        Err(error @ RpcError::Malformed { .. }) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
        Err(error @ RpcError::NotHosted) => (StatusCode::MISDIRECTED_REQUEST, error.to_string()).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

async fn propose(State(context): State<Context>, Json(proposal): Json<Proposal>) -> Json<Result<Proposed, Attempt>> {
    Json(context.agent.propose_here(context.member, &proposal).await)
}

async fn report(
    State(context): State<Context>,
    Extension(peer): Extension<Peer>,
    Json(said): Json<Numbered>,
) -> Response {
    let Peer::Remote { node: Some(node) } = peer else { return StatusCode::FORBIDDEN.into_response() };
    if !context.member.consensus.standing().borrow().is_coordinator() {
        return (StatusCode::MISDIRECTED_REQUEST, "this node is not the coordinator").into_response();
    }
    context.member.reports.hear(node, said);
    Json(()).into_response()
}

async fn observed(State(context): State<Context>) -> Response {
    if !context.member.consensus.standing().borrow().is_coordinator() {
        return (StatusCode::MISDIRECTED_REQUEST, "this node is not the coordinator").into_response();
    }
    Json(coordinator::observe(context.member).nodes).into_response()
}

async fn quorum(State(context): State<Context>) -> Response {
    match members::surveyed(context.member) {
        Some(survey) => Json(survey).into_response(),
        None => (StatusCode::MISDIRECTED_REQUEST, "this node is not the coordinator").into_response(),
    }
}

async fn hand_over(State(context): State<Context>, Json(to): Json<Option<NodeId>>) -> Json<Succession> {
    let until = Instant::now() + HAND_OVER_WITHIN;
    Json(context.agent.hand_over_here(context.member, to, until).await)
}

async fn probe(State(context): State<Context>, Json(probe): Json<Probe>) -> Json<Probed> {
    Json(context.agent.probe_volume(probe).await)
}

async fn probe_lun(State(context): State<Context>, Json(probe): Json<LunProbe>) -> Json<LunProbed> {
    Json(context.agent.probe_lun(probe).await)
}

async fn fence_test(State(context): State<Context>, Json(call): Json<FenceTestCall>) -> Json<FenceTest> {
    let state = context.agent.state();
    Json(context.agent.try_fencing(&state, call.node, &call.fencing).await)
}

async fn probe_witness(State(context): State<Context>, Json(probe): Json<witness::Probe>) -> Json<witness::Probed> {
    Json(context.agent.probe_witness(probe).await)
}

async fn go_on(
    State(context): State<Context>,
    Path(vm): Path<uuid::Uuid>,
    Json(call): Json<HandoverCall>,
) -> Json<HandedOver> {
    Json(context.agent.continue_here(context.member, VmId(vm), call).await)
}

async fn console(State(context): State<Context>, Path(vm): Path<uuid::Uuid>, mut request: Request) -> Response {
    let mut serial = match context.agent.local_console(VmId(vm)).await {
        Ok(serial) => serial,
        Err(failure) => return ApiError::from(failure).into_response(),
    };
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrading.await {
            // Either end may leave whenever it likes.
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(upgraded), &mut serial).await;
        }
    });
    let headers = [(axum::http::header::CONNECTION, "upgrade"), (axum::http::header::UPGRADE, CONSOLE_PROTOCOL)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn join(State(context): State<Context>, Json(request): Json<JoinRequest>) -> Response {
    let answer: Result<JoinAnswer, Failure> = context.agent.admit(request).await;
    match answer {
        Ok(answer) => Json(answer).into_response(),
        Err(failure) => {
            let error = ApiError::from(failure);
            (error.status, Json(JoinRefusal { code: error.code, text: error.message })).into_response()
        }
    }
}
