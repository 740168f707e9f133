"""Options of trainer, adapters and model as they are typed, one case a line: what trains, and what is refused."""

TRAINS = """
trainer.per_device_train_batch_size=100
trainer.num_train_epochs=0.1 trainer.max_steps=-1
trainer.lr_scheduler_type=linear
trainer.lr_scheduler_type=cosine
trainer.lr_scheduler_type=cosine_with_restarts trainer.lr_scheduler_kwargs={num_cycles:2}
trainer.lr_scheduler_type=polynomial
trainer.lr_scheduler_type=polynomial trainer.max_steps=1 trainer.warmup_steps=0
trainer.lr_scheduler_type=polynomial trainer.lr_scheduler_kwargs={power:2.0,lr_end:1e-5}
trainer.lr_scheduler_type=constant
trainer.lr_scheduler_type=constant_with_warmup trainer.warmup_steps=1
trainer.lr_scheduler_type=inverse_sqrt trainer.max_steps=1
trainer.lr_scheduler_type=reduce_lr_on_plateau
trainer.lr_scheduler_type=cosine_with_min_lr trainer.lr_scheduler_kwargs={min_lr:1e-6}
trainer.lr_scheduler_type=cosine_with_min_lr trainer.lr_scheduler_kwargs={min_lr_rate:0.1} trainer.max_steps=1
trainer.lr_scheduler_type=cosine_warmup_with_min_lr trainer.lr_scheduler_kwargs={min_lr:1e-6}
trainer.lr_scheduler_type=warmup_stable_decay trainer.lr_scheduler_kwargs={num_decay_steps:1}
trainer.lr_scheduler_type=greedy
trainer.warmup_steps=5
trainer.warmup_steps=0.5
trainer.optim=adamw_torch
trainer.optim=adafactor
trainer.optim_target_modules=[q_proj]
trainer.optim_target_modules=[lora_A] adapter=lora
trainer.optim_target_modules=.*proj
trainer.optim=sgd
trainer.optim=adagrad
trainer.optim=rmsprop
trainer.optim=lion_32bit
trainer.optim=adamw_8bit
trainer.optim=paged_adamw_8bit
trainer.weight_decay=0.1
trainer.gradient_accumulation_steps=2
trainer.gradient_accumulation_steps=1000
trainer.average_tokens_across_devices=false
trainer.max_grad_norm=0
trainer.label_smoothing_factor=0.1
trainer.bf16=true
trainer.activation_checkpointing=true
trainer.activation_checkpointing=true trainer.activation_checkpointing_kwargs={use_reentrant:true}
trainer.activation_checkpointing=true trainer.activation_checkpointing_kwargs={use_reentrant:false} adapter=lora
trainer.use_cache=true
trainer.neftune_noise_alpha=5
trainer.neftune_noise_alpha=5 adapter=lora
trainer.torch_empty_cache_steps=1
trainer.logging_strategy=epoch
trainer.logging_steps=0.5
trainer.logging_first_step=true
trainer.include_num_input_tokens_seen=non_padding
trainer.log_level=info
trainer.disable_tqdm=true
trainer.report_to=all
trainer.eval_strategy=steps trainer.eval_steps=1
trainer.eval_strategy=epoch data.held_out=0
trainer.eval_on_start=true
trainer.eval_on_start=true data.held_out=0
trainer.eval_delay=1
trainer.eval_accumulation_steps=1
trainer.include_for_metrics=[loss]
trainer.prediction_loss_only=true
trainer.save_only_model=true trainer.save_strategy=steps trainer.save_steps=1
trainer.save_strategy=best trainer.eval_strategy=steps trainer.eval_steps=1 trainer.metric_for_best_model=eval_loss
trainer.save_strategy=steps trainer.save_steps=0.5
trainer.load_best_model_at_end=true
trainer.load_best_model_at_end=true trainer.metric_for_best_model=eval_p_stop
trainer.early_stopping_patience=1
trainer.full_determinism=true
trainer.data_seed=3
trainer.accelerator_config={split_batches:true}
trainer.accelerator_config={even_batches:false}
trainer.dataloader_drop_last=true
trainer.dataloader_num_workers=1
trainer.dataloader_persistent_workers=true trainer.dataloader_num_workers=1
trainer.dataloader_in_order=false
trainer.remove_unused_columns=false
trainer.label_names=[labels]
trainer.train_sampling_strategy=random
trainer.train_sampling_strategy=sequential
trainer.debug=underflow_overflow
trainer.max_length=null
trainer.packing=true
trainer.packing=true trainer.max_length=64
trainer.packing=true model.attn_implementation=eager
trainer.packing=true trainer.padding_free=true
trainer.packing=true trainer.eval_packing=false
trainer.packing=true trainer.pad_to_multiple_of=8
trainer.packing=true adapter=qlora
trainer.pad_to_multiple_of=8
trainer.loss_type=dft
trainer.loss_type=dft trainer.packing=true adapter=lora
trainer.loss_type=chunked_nll
trainer.effective_batch_size=8
model.dtype=bfloat16
model.dtype=float16
model.max_position_embeddings=4096
adapter=lora
adapter=lora adapter.lora.use_dora=true
adapter=lora adapter.lora.use_rslora=true
adapter=lora adapter.lora.init_lora_weights=pissa
adapter=lora adapter.lora.init_lora_weights=olora
adapter=lora adapter.lora.init_lora_weights=gaussian
adapter=lora adapter.lora.init_lora_weights=orthogonal
adapter=lora adapter.lora.bias=all
adapter=lora adapter.lora.layers_to_transform=[0] adapter.lora.target_modules=[q_proj]
adapter=lora adapter.lora.rank_pattern={q_proj:4}
adapter=lora adapter.lora.modules_to_save=[lm_head]
adapter=lora adapter.lora.trainable_token_indices=[1]
adapter=lora adapter.lora.layer_replication=[[0,2],[1,3]]
adapter=lora adapter.lora.exclude_modules=[q_proj]
adapter=lora adapter.loraplus_lr_ratio=16
adapter=lora adapter.loraplus_lr_ratio=16 trainer.optim=adamw_8bit
adapter=qlora
adapter=qlora adapter.lora.use_dora=true
adapter=qlora adapter.type=ia3
adapter=qlora trainer.activation_checkpointing=true
adapter=qlora model.dtype=float16
adapter.type=prompt_tuning adapter.prompt_tuning.num_virtual_tokens=4 model.chat_template=alpaca
adapter.type=p_tuning adapter.p_tuning.num_virtual_tokens=4 model.chat_template=alpaca
adapter.type=prefix_tuning adapter.prefix_tuning.num_virtual_tokens=4 model.chat_template=alpaca
adapter.type=cartridge adapter.cartridge.num_virtual_tokens=4 model.chat_template=alpaca
adapter.type=c3a adapter.c3a.block_size=32
adapter.type=road adapter.road.group_size=32
adapter.type=vblora adapter.vblora.vector_length=32
adapter.type=adalora adapter.adalora.total_step=10
"""
REFUSED = """
trainer.max_steps=0
trainer.num_train_epochs=0 trainer.max_steps=-1
trainer.learning_rate=0
trainer.lr_scheduler_type=polynomial trainer.max_steps=1
trainer.lr_scheduler_type=polynomial trainer.warmup_steps=2
trainer.lr_scheduler_type=polynomial trainer.learning_rate=1e-8
trainer.lr_scheduler_type=polynomial trainer.lr_scheduler_kwargs={lr_end:x}
trainer.lr_scheduler_type=polynomial trainer.max_steps=-1 trainer.num_train_epochs=1 trainer.per_device_train_batch_size=40
trainer.lr_scheduler_type=cosine trainer.lr_scheduler_kwargs={num_cycles:x}
trainer.lr_scheduler_type=cosine_with_min_lr
trainer.lr_scheduler_type=warmup_stable_decay
trainer.lr_scheduler_type=greedy trainer.lr_scheduler_kwargs={patience:1}
trainer.lr_scheduler_type=nope
trainer.warmup_steps=-1
trainer.optim=galore_adamw
trainer.optim=apollo_adamw trainer.optim_target_modules=[q_proj]
trainer.optim_target_modules=[q_prj]
trainer.optim=lomo
trainer.optim=adalomo
trainer.optim=grokadamw
trainer.optim=schedule_free_adamw
trainer.optim=adamw_torch_8bit
trainer.optim=adamw_anyprecision trainer.optim_args='"use_kahan_summation=True"'
trainer.optim_args=nonsense
trainer.weight_decay=-1
trainer.adam_beta1=2
trainer.gradient_accumulation_steps=0
trainer.max_grad_norm=-1
trainer.label_smoothing_factor=2
trainer.fp16=true
trainer.bf16=true trainer.fp16=true
trainer.bf16_full_eval=true
trainer.fp16_full_eval=true
trainer.tf32=true
trainer.activation_checkpointing=true trainer.activation_checkpointing_kwargs={nope:false}
trainer.torch_compile=true trainer.torch_compile_mode=nope
trainer.use_liger_kernel=true
trainer.neftune_noise_alpha=-5
trainer.torch_empty_cache_steps=0
trainer.auto_find_batch_size=true
trainer.logging_steps=0
trainer.log_level=nope
trainer.report_to=nope
trainer.report_to=wandb
trainer.eval_strategy=nope
trainer.eval_steps=0 trainer.eval_strategy=steps
trainer.per_device_eval_batch_size=0
trainer.save_strategy=best
trainer.save_strategy=steps trainer.save_steps=0
trainer.save_total_limit=0
trainer.push_to_hub=true
trainer.hub_strategy=nope
trainer.load_best_model_at_end=true data.held_out=0
trainer.load_best_model_at_end=true trainer.metric_for_best_model=nope
trainer.early_stopping_patience=0
trainer.early_stopping_patience=1 data.held_out=0
trainer.resume_from_checkpoint=3
trainer.accelerator_config={nope:true}
trainer.accelerator_config=nope.json
trainer.accelerator_config={gradient_accumulation_kwargs:{num_steps:2}} trainer.gradient_accumulation_steps=2
trainer.parallelism_config={tp_size:2}
trainer.dataloader_drop_last=true trainer.per_device_train_batch_size=100
trainer.dataloader_num_workers=-1
trainer.dataloader_persistent_workers=true
trainer.dataloader_prefetch_factor=2
trainer.dataloader_multiprocessing_context=spawn
trainer.dataloader_multiprocessing_context=nope trainer.dataloader_num_workers=1
trainer.ddp_backend=nope
trainer.fsdp=full_shard
trainer.fsdp=nope
trainer.deepspeed=nope.json
trainer.debug=nope
trainer.router_aux_loss_coef=0.1
trainer.max_length=0
trainer.max_length=1
trainer.max_length=100000
trainer.packing=true trainer.max_length=null
trainer.packing=true model.attn_implementation=flash_attention_2
trainer.packing=true model.attn_implementation=flex_attention
trainer.packing=true adapter.type=prompt_tuning adapter.prompt_tuning.num_virtual_tokens=4 model.chat_template=alpaca
trainer.packing_strategy=wrapped
trainer.padding_free=true
trainer.pad_to_multiple_of=0
trainer.pad_to_multiple_of=-3
trainer.pad_to_multiple_of=100000
trainer.pad_to_multiple_of=abc
trainer.loss_type=nope
trainer.activation_offloading=true
trainer.completion_only_loss=true
trainer.assistant_only_loss=true
trainer.chat_template_path=x
trainer.model_init_kwargs={dtype:float32}
trainer.formatting_func=x
trainer.effective_batch_size=7
model.attn_implementation=nope
model.dtype=nope
model.bos=false
model.max_position_embeddings=10
seed=-1
adapter=lora adapter.lora.r=0
adapter=lora adapter.lora.target_modules=[q_prj]
adapter=lora adapter.lora.target_modules=[lm_head]
adapter=lora adapter.lora.exclude_modules=[nope]
adapter=lora adapter.lora.modules_to_save=[nope]
adapter=lora adapter.lora.init_lora_weights=eva
adapter=lora adapter.lora.init_lora_weights=nope
adapter=lora adapter.lora.bias=nope
adapter.type=waveft adapter.waveft.bias=nope
adapter.type=frod adapter.frod.bias=nope
adapter.type=vblora adapter.vblora.vector_length=-1
adapter.type=p_tuning adapter.p_tuning.num_virtual_tokens=4 adapter.p_tuning.token_dim=3 model.chat_template=alpaca
adapter.type=cartridge adapter.cartridge.num_virtual_tokens=4 adapter.cartridge.num_layers=2 model.chat_template=alpaca
adapter=lora adapter.lora.layers_to_transform=[0]
adapter=lora adapter.lora.layers_to_transform=[99] adapter.lora.target_modules=[q_proj]
adapter=lora adapter.lora.layers_pattern=nope adapter.lora.target_modules=[q_proj]
adapter=lora adapter.lora.target_parameters=[mlp.up_proj.weight]
adapter=lora adapter.lora.target_parameters=[nope.weight]
adapter=lora adapter.lora.trainable_token_indices=[999999]
adapter=lora adapter.lora.trainable_token_indices={nope:[1]}
adapter=lora adapter.lora.megatron_config={a:1}
adapter=lora adapter.lora.inference_mode=true
adapter=lora adapter.lora.task_type=SEQ_CLS
adapter=lora adapter.lora.loftq_config={a:1}
adapter=qlora adapter.lora.init_lora_weights=pissa
adapter=qlora adapter.quantization.load_in_8bit=true
adapter=qlora adapter.quantization.bnb_4bit_quant_type=nope
adapter=qlora adapter.quantization.bnb_4bit_quant_storage=nope
adapter.type=prompt_tuning model.chat_template=alpaca
adapter.type=adalora
adapter.type=c3a
adapter.type=road
adapter.type=vblora
adapter.type=trainable_tokens adapter.trainable_tokens.token_indices=[1,2] model.chat_template=alpaca
adapter.type=nope
"""
